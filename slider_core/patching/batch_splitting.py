"""A batch of any length on a model that has room for a few images: each model call is split, the sampler is not.

The result is that of the whole batch, up to the rounding of batched arithmetic, with any sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from comfy.conds import CONDList
from comfy.model_base import BaseModel
from comfy.model_management import get_free_memory, throw_exception_if_processing_interrupted
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..errors import SliderError
from .forward_patches import BATCH_SLICE, BatchSlice

_KEY = "edit_sliders.images_at_once"
_RESERVE = 1.5  # of the memory that ComfyUI expects a call to need, as it keeps itself when it batches conds

ApplyModel = Callable[..., torch.Tensor]
Arguments = Mapping[str, Any]
"""What ComfyUI gives a model function wrapper: input, timestep, c and cond_or_uncond."""


def split_batches(model: ModelPatcher, at_once: int) -> ModelPatcher:
    """A clone of `model` that computes at most `at_once` images of a batch in one call; 0: as many as fit in memory.

    Cond and uncond of an image count as one image. ComfyUI then makes room for these, not for the whole batch.
    Raises SliderError when the model already is split; later, when it has sliders that look from image to image.
    """
    if model.get_wrappers(WrappersMP.PREPARE_SAMPLING, _KEY):
        raise SliderError("The batches of this model are already split; expected one 'Images at Once'. Remove one.")
    patched = model.clone()
    other = model.model_options.get("model_function_wrapper")
    patched.set_model_unet_function_wrapper(partial(_in_parts, patched.model, at_once, other))
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, partial(_prepare, at_once))
    return patched


def _prepare(
    at_once: int, executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **more: Any
) -> Any:
    images = min(noise_shape[0], at_once or 1)
    return executor(model, [images, *noise_shape[1:]], *args, **more)


def _in_parts(
    base: BaseModel, at_once: int, other: Callable[..., torch.Tensor] | None, apply: ApplyModel, args: Arguments
) -> torch.Tensor:
    x, count = args["input"], len(args["cond_or_uncond"])
    images = x.shape[0] // count
    size = min(at_once or images_that_fit(images, _needed(base, args), get_free_memory(x.device)), images)

    def call(some: Arguments) -> torch.Tensor:
        return other(apply, some) if other else apply(some["input"], some["timestep"], **some["c"])

    if size == images:
        return call(args)
    outs = []
    for start in range(0, images, size):
        throw_exception_if_processing_interrupted()
        part = BatchSlice(start, min(start + size, images), images)
        outs.append(call(_arguments(args, part, count)).unflatten(0, (count, -1)))
    return torch.cat(outs, dim=1).flatten(0, 1)


def images_that_fit(images: int, needed: float, free: float) -> int:
    """How many of `images` images, which need so many bytes together, fit in the free ones; at least one."""
    return max(1, min(images, int(free * images / (needed * _RESERVE))))


def _needed(base: BaseModel, args: Arguments) -> float:
    references = args["c"].get("ref_latents")
    shapes = {} if references is None else {"ref_latents": [CONDList(references).size()]}
    return base.memory_required(list(args["input"].shape), cond_shapes=shapes)


def _arguments(args: Arguments, part: BatchSlice, count: int) -> dict[str, Any]:
    """Those of the part's images; the batch is made of `count` conds with all images each."""
    rows = args["input"].shape[0]
    chosen = torch.arange(rows).unflatten(0, (count, -1))[:, part.start : part.end].flatten()
    options = args["c"]["transformer_options"]
    options = {**options, BATCH_SLICE: part, "sigmas": options["sigmas"][part.start : part.end]}
    if "uuids" in options:  # by which caches such as EasyCache tell what they have seen
        options["uuids"] = [(uuid, *part) for uuid in options["uuids"]]
    c = {key: _rows(value, rows, chosen) for key, value in args["c"].items() if key != "transformer_options"}
    return {
        **args,
        "input": _rows(args["input"], rows, chosen),
        "timestep": _rows(args["timestep"], rows, chosen),
        "c": {**c, "transformer_options": options},
    }


def _rows(value: Any, rows: int, chosen: torch.Tensor) -> Any:
    """The chosen rows of every tensor in there that has a row for each of the batch."""
    if isinstance(value, torch.Tensor):
        return value[chosen.to(value.device)] if value.ndim and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: _rows(item, rows, chosen) for key, item in value.items()}
    return [_rows(item, rows, chosen) for item in value] if isinstance(value, list) else value
