"""The one way in which this pack changes a model: forwards of single modules, overridden for one model call.

One APPLY_MODEL wrapper per patched ModelPatcher runs a list of operations. Each names the modules it wraps for this
call; their forwards are restored when the call ends, whatever ends it. Weights, classes and the diffusion model itself
are never touched, so branches, bypassed nodes and interrupted runs cannot leak.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ..errors import SliderError
from ..families.network import diffusion_model_of

COND_PREFIX = "edit_sliders."
"""Names of tensors in a cond's `model_conds` that are for the operations. A model without any gets them too, unread."""

TIME_RANGE = COND_PREFIX + "time_range"
"""Of those, the start and end of the part of the schedule that a cond was made for."""

BATCH_SLICE = "edit_sliders.part"
"""Name in transformer_options of the Part of the batch that a model call is for, when it is split."""

_KEY = "edit_sliders"

Forward = Callable[..., Any]
ForwardWrapper = Callable[[Forward], Forward]
"""Makes the module's forward for one call out of its present one. The result must be a plain function: torch.compile
recompiles for every new functools.partial or lambda default, but not for new closures of the same code."""


class BatchSlice(NamedTuple):
    """Images start..end of a batch of so many `images`."""

    start: int
    end: int
    images: int


class ModelInputs(NamedTuple):
    """What a model is called with, as core gives it to a wrapper; the operations' conds are among the further ones.

    options: transformer_options, with all that other nodes put there.
    """

    x: torch.Tensor
    t: torch.Tensor
    c_concat: torch.Tensor | None
    c_crossattn: torch.Tensor | None
    control: Any
    options: Mapping[str, Any]
    further: Mapping[str, Any]


@dataclass(frozen=True)
class ForwardContext:
    """What one model call is about.

    conds: what is ours in the conds of this call: tensors, first dimension images * count (images vary fastest), and
    constants that all these conds share.
    images: images in the latent batch; count: conds that share this call.
    num_text_tokens: rows of text that the model gets. latent: shape of what it denoises.
    dtype: in which it computes. weights: tells differently patched weights apart.
    sigma: its noise level. percent_to_sigma: from a share of the schedule to the noise level there.
    inputs: what it is called with. run: calls the model itself, with other operations and inputs.
    """

    conds: Mapping[str, Any]
    images: int
    count: int
    num_text_tokens: int
    device: torch.device
    dtype: torch.dtype
    weights: object
    latent: Sequence[int]
    sigma: torch.Tensor
    percent_to_sigma: Callable[[float], float]
    inputs: ModelInputs
    run: Callable[[tuple[ModelPatch, ...], ModelInputs], torch.Tensor]

    def within(self, start: float, end: float) -> bool:
        """Whether the call lies in this part of the schedule, 0 to 1, with its borders."""
        return in_schedule_range(self.sigma, self.percent_to_sigma, start, end)


def in_schedule_range(
    sigma: torch.Tensor, percent_to_sigma: Callable[[float], float], start: float, end: float
) -> bool:
    """Whether a noise level (0-dim) lies in this part of the schedule, 0 to 1, with its borders.

    Compared in the noise level's own precision, as ComfyUI does for the part of the schedule that a cond has.
    """
    everywhere = start <= 0 and end >= 1
    return everywhere or bool(percent_to_sigma(end) <= sigma <= percent_to_sigma(start))


AttentionPatch = Callable[..., dict[str, Any]]
"""ComfyUI's attn1_patch: (q, k, v, pe=..., attn_mask=..., extra_options=...) to those of them that it replaces."""


class ModelPatch:
    """A change to the model. `lora_branches` holds its weights, moved by ComfyUI together with the model, or is None.

    batch_independent: whether what it does to an image takes nothing from the others of the batch, so that they can be
    computed apart.
    """

    lora_branches: ModelPatcher | None = None
    batch_independent = False

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        """Module path inside the diffusion model -> what to put around its forward. Empty leaves the call alone."""
        return {}

    def attention_patches(self, context: ForwardContext) -> Sequence[AttentionPatch]:
        """What to do to the inputs of every attention of this call. Not to be had under torch.compile."""
        return ()


def add_patch(model: ModelPatcher, patch: ModelPatch) -> ModelPatcher:
    """A clone of `model` that also runs `operation`, after those it already has. `model` itself is not changed."""
    patched = model.clone()
    patches = (*patches_of(model), patch)
    _set_patches(patched, patches)
    branch_patchers = [op.lora_branches.clone() for op in patches if op.lora_branches is not None]
    patched.set_additional_models(_KEY, branch_patchers)
    patched.remove_callbacks_with_key(CallbacksMP.ON_DEEPCLONE_MULTIGPU, _KEY)
    patched.add_callback_with_key(CallbacksMP.ON_DEEPCLONE_MULTIGPU, _KEY, _use_own_side_models)
    return patched


def patches_of(model: ModelPatcher) -> tuple[ModelPatch, ...]:
    """The operations that `model` runs, in their order."""
    return model.get_attachment(_KEY) or ()


def _set_patches(model: ModelPatcher, patches: tuple[ModelPatch, ...]) -> None:
    model.set_attachments(_KEY, patches)
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, _KEY)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, partial(_run, patches))


def _use_own_side_models(_: ModelPatcher, copied: ModelPatcher) -> None:
    """ComfyUI has copied a model and its side models for a further GPU: make the operations use those copies."""
    branch_patchers = iter(copied.get_additional_models_with_key(_KEY))
    patches = tuple(map(copy.copy, patches_of(copied)))
    for patch in patches:
        if patch.lora_branches is not None:
            patch.lora_branches = next(branch_patchers)
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
    conds = {key: _moved(value, x.device) for key, value in kwargs.items() if key.startswith(COND_PREFIX)}
    others = {key: value for key, value in kwargs.items() if key not in conds}
    count = len(transformer_options.get("cond_or_uncond", (0,)))
    if BATCH_SLICE in transformer_options:
        _check_batch_independent(patches)
    base = executor.class_obj
    context = ForwardContext(
        conds=conds,
        images=x.shape[0] // count,
        count=count,
        num_text_tokens=0 if c_crossattn is None else c_crossattn.shape[1],
        device=x.device,
        dtype=base.get_dtype_inference(),
        weights=base.current_weight_patches_uuid,
        latent=x.shape,
        sigma=t[0],
        percent_to_sigma=base.model_sampling.percent_to_sigma,
        inputs=inputs,
        run=partial(_run_again, executor),
    )
    if not context.within(*context.conds.get(TIME_RANGE, (0, 1))):
        raise SliderError(
            "A conditioning that 'Where and When' or 'Prompt Difference' divided in time got another part of the "
            "schedule behind it; expected 'ConditioningSetTimestepRange' before it. Change their order."
        )
    changes = [patch.forward_wrappers(context) for patch in patches]
    for patch in patches:
        transformer_options = _with_attention_patches(transformer_options, patch.attention_patches(context))
    model = diffusion_model_of(base)
    with patched_forwards(model, changes):
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **others)


def _check_batch_independent(patches: tuple[ModelPatch, ...]) -> None:
    if not all(patch.batch_independent for patch in patches):
        raise SliderError(
            "The batch is split by 'Images at Once', but the model lets its images look at one another or keeps what "
            "it saw of them (such as 'Inject Vital Layers' and 'Remember Source'); expected none of these. Raise "
            "at_once to the number of images, or bypass it."
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _run_again(executor: Any, patches: tuple[ModelPatch, ...], inputs: ModelInputs) -> torch.Tensor:
    return _run(patches, executor, *inputs[:-1], **inputs.further)


def _with_attention_patches(options: Mapping[str, Any], patches: Sequence[AttentionPatch]) -> Mapping[str, Any]:
    if not patches:
        return options
    if COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        raise SliderError(
            "The model is compiled (torch.compile), which ignores changes to attention, so these sliders would do "
            "nothing. Bypass the compile node."
        )
    known = options.get("patches", {})
    return {**options, "patches": {**known, "attn1_patch": [*known.get("attn1_patch", ()), *patches]}}


@contextlib.contextmanager
def patched_forwards(model: torch.nn.Module, changes: Sequence[Mapping[str, ForwardWrapper]]) -> Iterator[None]:
    """Until the context ends the named submodules of a diffusion model run with these changes, the last outermost."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            for path, wrap in change.items():
                stack.enter_context(_patched_forward(model.get_submodule(path), wrap))
        yield


@contextlib.contextmanager
def _patched_forward(module: torch.nn.Module, wrap: ForwardWrapper) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = wrap(own or _class_forward(module))
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _class_forward(module: torch.nn.Module) -> Forward:
    """The module's own forward, not as a bound method: torch.compile would recompile when that is collected."""
    forward = type(module).forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    return call
