"""How this pack patches the network: the forwards of single modules, wrapped for one model call. (Samplers, the
post-CFG function of Velocity Blending and the splitting of batches are hooked elsewhere.)

One APPLY_MODEL wrapper per patched ModelPatcher runs a list of ModelPatch objects. Each one names the modules it wraps
for this call; their forwards are restored when the call ends, even by an exception. Weights, classes and the diffusion
model itself are never touched, so branches of a graph, bypassed nodes and interrupted runs cannot leak.

Patches run in the order of their Phase, whatever the order of the nodes that added them.
"""

from __future__ import annotations

import contextlib
import copy
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from .. import keys
from .. import node_names as names
from ..errors import SliderError
from ..families.network import diffusion_model_of

Forward = Callable[..., Any]
ForwardWrapper = Callable[[Forward], Forward]
"""Takes a module's current forward and returns the one to use during this model call. The result must be a plain
function: torch.compile recompiles for every new functools.partial or lambda default, but not for new closures of the
same code."""

AttentionPatch = Callable[..., dict[str, Any]]
"""ComfyUI's attn1_patch: (q, k, v, pe=..., attn_mask=..., extra_options=...) -> the ones it replaces."""


class Phase(enum.IntEnum):
    """When a patch acts on the output of a module that several patches wrap: the lowest phase first (innermost).

    ADD: adds to the output of a linear (LoRA branches; a strength projector's LoRA runs in OFFSET, with its offsets).
    SCALE, OFFSET: multiply a modulation, then add to it, so that a strength projector's offsets are never scaled. SCALE
        also has the attention patch that reweights attention.
    REPLACE: overwrites tokens with others, LoRA included: token interpolation, key/value injection, bypassed blocks.
    OBSERVE: records the final values and changes nothing.
    """

    ADD = 0
    SCALE = 1
    OFFSET = 2
    REPLACE = 3
    OBSERVE = 4


class BatchSlice(NamedTuple):
    """Images [start, end) of a batch of `batch_size` images."""

    start: int
    end: int
    batch_size: int


class ModelInputs(NamedTuple):
    """Arguments of a model call, as ComfyUI passes them to an APPLY_MODEL wrapper.

    extra_kwargs: the remaining model_conds, including the pack's own (keys.COND_PREFIX).
    """

    x: torch.Tensor
    t: torch.Tensor
    c_concat: torch.Tensor | None
    c_crossattn: torch.Tensor | None
    control: Any
    transformer_options: Mapping[str, Any]
    extra_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class ForwardContext:
    """One model call, as patches see it.

    conds: the pack's model_conds of this call: tensors with a first dimension of num_images * num_conds (images vary
        fastest), and constants that all conds of the call share.
    num_images: batch size of the latent. num_conds: conds that share this call (cond and uncond, for example).
    num_text_tokens: length of the text that the model gets.
    latent_shape: of the noisy latents, (num_images * num_conds, channels, ...).
    dtype: that the model computes in.
    weight_patches_id: ComfyUI's current_weight_patches_uuid; equal ids mean equal LoRA weight patches.
    sigma: noise level of the call, 0-dim. percent_to_sigma: fraction of the schedule (0 to 1) -> sigma.
    inputs: arguments of the call. run: calls the model with other patches and other inputs.
    """

    conds: Mapping[str, Any]
    num_images: int
    num_conds: int
    num_text_tokens: int
    device: torch.device
    dtype: torch.dtype
    weight_patches_id: object
    latent_shape: Sequence[int]
    sigma: torch.Tensor
    percent_to_sigma: Callable[[float], float]
    inputs: ModelInputs
    run: Callable[[tuple[ModelPatch, ...], ModelInputs], torch.Tensor]

    def within(self, start: float, end: float) -> bool:
        """Whether the call is in this range of the schedule (0 to 1, both ends included)."""
        return in_schedule_range(self.sigma, self.percent_to_sigma, start, end)


def in_schedule_range(
    sigma: torch.Tensor, percent_to_sigma: Callable[[float], float], start: float, end: float
) -> bool:
    """Whether a sigma (0-dim) is in this range of the schedule (0 to 1, both ends included).

    Compared in the precision of `sigma`, as ComfyUI does for start_percent and end_percent.
    """
    whole_schedule = start <= 0 and end >= 1
    return whole_schedule or bool(percent_to_sigma(end) <= sigma <= percent_to_sigma(start))


class ModelPatch:
    """A change to the model during model calls.

    phase: where it stands among the patches of a model.
    branch_patcher: ModelPatcher of its LoRA branches, loaded and offloaded with the model; None if it has none.
    batch_independent: True if what it does to an image depends on no other image, so that a batch may be split.
    """

    phase: Phase
    branch_patcher: ModelPatcher | None = None
    batch_independent = False

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """Order within the phase, for patches that do not commute with others of their phase."""
        return ()

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        """Module path in the diffusion model -> wrapper of its forward. Empty: this call is not changed."""
        return {}

    def attention_patches(self, context: ForwardContext) -> Sequence[AttentionPatch]:
        """Patches of the inputs of every attention in this call. Refused under torch.compile."""
        return ()


def add_patch(model: ModelPatcher, patch: ModelPatch) -> ModelPatcher:
    """A clone of `model` with `patch` among its patches, in the order of their phases. `model` is not changed."""
    patched = model.clone()
    patches = tuple(sorted((*patches_of(model), patch), key=lambda p: (p.phase, p.sort_key)))
    _set_patches(patched, patches)
    branches = [p.branch_patcher.clone() for p in patches if p.branch_patcher is not None]
    patched.set_additional_models(keys.PATCHES, branches)
    patched.remove_callbacks_with_key(CallbacksMP.ON_DEEPCLONE_MULTIGPU, keys.PATCHES)
    patched.add_callback_with_key(CallbacksMP.ON_DEEPCLONE_MULTIGPU, keys.PATCHES, _use_copied_branches)
    return patched


def patches_of(model: ModelPatcher) -> tuple[ModelPatch, ...]:
    """The patches of `model`, in the order in which they run."""
    return model.get_attachment(keys.PATCHES) or ()


def _set_patches(model: ModelPatcher, patches: tuple[ModelPatch, ...]) -> None:
    model.set_attachments(keys.PATCHES, patches)
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, keys.PATCHES)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, keys.PATCHES, partial(_run, patches))


def _use_copied_branches(_: ModelPatcher, copied: ModelPatcher) -> None:
    """After ComfyUI copied a model for another GPU: make its patches use the copied LoRA branches."""
    branches = iter(copied.get_additional_models_with_key(keys.PATCHES))
    patches = tuple(map(copy.copy, patches_of(copied)))
    for patch in patches:
        if patch.branch_patcher is not None:
            patch.branch_patcher = next(branches)
    _set_patches(copied, patches)


def _run(
    patches: tuple[ModelPatch, ...],
    executor: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: torch.Tensor | None = None,
    c_crossattn: torch.Tensor | None = None,
    control: Any = None,
    transformer_options: Mapping[str, Any] = MappingProxyType({}),
    **kwargs: Any,
) -> torch.Tensor:
    inputs = ModelInputs(x, t, c_concat, c_crossattn, control, transformer_options, kwargs)
    conds = {key: _to_device(value, x.device) for key, value in kwargs.items() if key.startswith(keys.COND_PREFIX)}
    model_kwargs = {key: value for key, value in kwargs.items() if key not in conds}
    num_conds = len(transformer_options.get("cond_or_uncond", (0,)))
    if keys.BATCH_SLICE in transformer_options:
        _check_batch_independent(patches)
    base = executor.class_obj
    context = ForwardContext(
        conds=conds,
        num_images=x.shape[0] // num_conds,
        num_conds=num_conds,
        num_text_tokens=0 if c_crossattn is None else c_crossattn.shape[1],
        device=x.device,
        dtype=base.get_dtype_inference(),
        weight_patches_id=base.current_weight_patches_uuid,
        latent_shape=x.shape,
        sigma=t[0],
        percent_to_sigma=base.model_sampling.percent_to_sigma,
        inputs=inputs,
        run=partial(_run_again, executor),
    )
    if not context.within(*context.conds.get(keys.SCHEDULE_RANGE, (0, 1))):
        raise SliderError(
            f"'ConditioningSetTimestepRange' changed the schedule range of a conditioning that "
            f"'{names.MASK_AND_SCHEDULE}' or '{names.PROMPT_DIFFERENCE}' had already split by schedule; expected it "
            "before that node. Swap the two nodes."
        )
    wrappers = [patch.forward_wrappers(context) for patch in patches]
    for patch in patches:
        transformer_options = _with_attention_patches(transformer_options, patch.attention_patches(context))
    model = diffusion_model_of(base)
    with patched_forwards(model, wrappers):
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **model_kwargs)


def _check_batch_independent(patches: tuple[ModelPatch, ...]) -> None:
    if not all(patch.batch_independent for patch in patches):
        raise SliderError(
            f"'{names.SPLIT_BATCH}' splits the batch, but a node on the model uses one image of the batch for another "
            f"or records it (such as '{names.KEEP_SOURCE}' and '{names.CACHE_SOURCE}'); expected no such node. Raise "
            "max_batch_size to the number of images, or bypass one of the two nodes."
        )


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _run_again(executor: Any, patches: tuple[ModelPatch, ...], inputs: ModelInputs) -> torch.Tensor:
    return _run(patches, executor, *inputs[:-1], **inputs.extra_kwargs)


def _with_attention_patches(options: Mapping[str, Any], patches: Sequence[AttentionPatch]) -> Mapping[str, Any]:
    if not patches:
        return options
    if COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        raise SliderError(
            "The model is compiled (torch.compile), and compiled models ignore attention patches, so these sliders "
            "would do nothing; expected a model that is not compiled. Bypass the compile node."
        )
    all_patches = options.get("patches", {})
    return {**options, "patches": {**all_patches, "attn1_patch": [*all_patches.get("attn1_patch", ()), *patches]}}


@contextlib.contextmanager
def patched_forwards(model: torch.nn.Module, wrappers: Sequence[Mapping[str, ForwardWrapper]]) -> Iterator[None]:
    """Wrap the forwards of submodules of a diffusion model until the context ends; the last wrapper is outermost.

    wrappers: mappings from module path to ForwardWrapper.
    """
    with contextlib.ExitStack() as stack:
        for by_path in wrappers:
            for path, wrapper in by_path.items():
                stack.enter_context(_patched_forward(model.get_submodule(path), wrapper))
        yield


@contextlib.contextmanager
def _patched_forward(module: torch.nn.Module, wrapper: ForwardWrapper) -> Iterator[None]:
    instance_forward = vars(module).get("forward")
    module.forward = wrapper(instance_forward or _class_forward(module))
    try:
        yield
    finally:
        if instance_forward is None:
            del module.forward
        else:
            module.forward = instance_forward


def _class_forward(module: torch.nn.Module) -> Forward:
    """The forward of the module's class, not as a bound method: torch.compile recompiles when that is collected."""
    forward = type(module).forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    return call
