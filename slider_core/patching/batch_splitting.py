"""Sweeps of any length on a model that has memory for a few images: each model call is split, the sampler is not.

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

from .. import keys
from .. import node_names as names
from ..errors import SliderError
from .forward_patches import BatchSlice

_MEMORY_MARGIN = 1.5
"""Factor on the estimated memory of a call, the same that ComfyUI uses when it batches conds."""

ApplyModel = Callable[..., torch.Tensor]
WrapperArgs = Mapping[str, Any]
"""What ComfyUI passes to a model function wrapper: input, timestep, c and cond_or_uncond."""


def split_batches(model: ModelPatcher, max_batch_size: int) -> ModelPatcher:
    """A clone of `model` that computes at most `max_batch_size` images in one call; 0: as many as fit in memory.

    Cond and uncond of an image count as one image. ComfyUI then reserves memory for these, not for the whole batch.
    Raises SliderError when the model is already split; when sampling, if a patch is not batch independent.
    """
    if model.get_wrappers(WrappersMP.PREPARE_SAMPLING, keys.BATCH_SPLITTING):
        raise SliderError(
            f"The model already has a '{names.SPLIT_BATCH}'; expected one at most. Remove one of the two nodes."
        )
    patched = model.clone()
    other_wrapper = model.model_options.get("model_function_wrapper")
    patched.set_model_unet_function_wrapper(partial(_apply_in_slices, patched.model, max_batch_size, other_wrapper))
    patched.add_wrapper_with_key(
        WrappersMP.PREPARE_SAMPLING, keys.BATCH_SPLITTING, partial(_prepare_sampling, max_batch_size)
    )
    return patched


def _prepare_sampling(
    max_batch_size: int, executor: Any, model: ModelPatcher, noise_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    batch_size = min(noise_shape[0], max_batch_size or 1)
    return executor(model, [batch_size, *noise_shape[1:]], *args, **kwargs)


def _apply_in_slices(
    base: BaseModel,
    max_batch_size: int,
    other_wrapper: Callable[..., torch.Tensor] | None,
    apply_model: ApplyModel,
    args: WrapperArgs,
) -> torch.Tensor:
    x, num_conds = args["input"], len(args["cond_or_uncond"])
    num_images = x.shape[0] // num_conds
    fitting = max_batch_size or images_that_fit(num_images, _memory_required(base, args), get_free_memory(x.device))
    size = min(fitting, num_images)

    def apply(slice_args: WrapperArgs) -> torch.Tensor:
        if other_wrapper:
            return other_wrapper(apply_model, slice_args)
        return apply_model(slice_args["input"], slice_args["timestep"], **slice_args["c"])

    if size == num_images:
        return apply(args)
    outputs = []
    for start in range(0, num_images, size):
        throw_exception_if_processing_interrupted()
        batch_slice = BatchSlice(start, min(start + size, num_images), num_images)
        outputs.append(apply(_slice_args(args, batch_slice, num_conds)).unflatten(0, (num_conds, -1)))
    return torch.cat(outputs, dim=1).flatten(0, 1)


def images_that_fit(num_images: int, required: float, free: float) -> int:
    """How many of `num_images` images fit into `free` bytes if all of them need `required` bytes; at least one."""
    return max(1, min(num_images, int(free * num_images / (required * _MEMORY_MARGIN))))


def _memory_required(base: BaseModel, args: WrapperArgs) -> float:
    references = args["c"].get("ref_latents")
    shapes = {} if references is None else {"ref_latents": [CONDList(references).size()]}
    return base.memory_required(list(args["input"].shape), cond_shapes=shapes)


def _slice_args(args: WrapperArgs, batch_slice: BatchSlice, num_conds: int) -> dict[str, Any]:
    """The arguments for some images of a batch that is made of `num_conds` conds with all images each."""
    batch_size = args["input"].shape[0]
    indices = torch.arange(batch_size).unflatten(0, (num_conds, -1))[:, batch_slice.start : batch_slice.end].flatten()
    options = args["c"]["transformer_options"]
    sigmas = options["sigmas"][batch_slice.start : batch_slice.end]
    options = {**options, keys.BATCH_SLICE: batch_slice, "sigmas": sigmas}
    if "uuids" in options:  # caches such as EasyCache key their state by them
        options["uuids"] = [(uuid, *batch_slice) for uuid in options["uuids"]]
    c = {key: _select(value, batch_size, indices) for key, value in args["c"].items() if key != "transformer_options"}
    return {
        **args,
        "input": _select(args["input"], batch_size, indices),
        "timestep": _select(args["timestep"], batch_size, indices),
        "c": {**c, "transformer_options": options},
    }


def _select(value: Any, batch_size: int, indices: torch.Tensor) -> Any:
    """The chosen batch entries of every tensor in `value`, however nested, whose first dimension is `batch_size`."""
    if isinstance(value, torch.Tensor):
        return value[indices.to(value.device)] if value.ndim and value.shape[0] == batch_size else value
    if isinstance(value, dict):
        return {key: _select(item, batch_size, indices) for key, item in value.items()}
    return [_select(item, batch_size, indices) for item in value] if isinstance(value, list) else value
