"""Source KV cache: keys and values of a source image, computed once and injected into every later edit.

The injection of Stable Flow (arXiv 2411.14430, section 3.2; see vital_layers.py) without the source in the batch: for
each model call of the source, at noise level sigma, the image tokens' K and V of the chosen blocks are kept in RAM, and
at the same sigma

    K <- K + w (K_source(sigma) - K)        V <- V + w (V_source(sigma) - V)

in every image of an edit. When they do not fit into memory, only the inputs of the source's model calls are kept, and
each call is repeated during the edit.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from .. import node_names as names
from ..conditioning.active_region import EVERYWHERE, ActiveRegion
from ..errors import SliderError
from ..patching.forward_patches import (
    ForwardContext,
    ForwardWrapper,
    ModelInputs,
    ModelPatch,
    Phase,
    add_patch,
    patches_of,
)
from ..patching.model_fingerprint import ModelFingerprint, fingerprint_of
from ..sampling.deterministic_samplers import ONE_CALL_PER_STEP
from ..sampling.flow_matching import Denoise, StepSampler, check_flow_matching, run_sampler
from ..sampling.sampling_settings import SamplingSettings
from ..types import Conditioning, OnStep
from .trajectory import Trajectory
from .vital_layers import InjectionWeight, KVSlots

_FRACTION_OF_FREE_MEMORY = 0.5
_SIGMA_TOLERANCE = 1e-4


class CachedStep(NamedTuple):
    """One model call of the source.

    inputs: on the CPU. weight_patches_id: ForwardContext.weight_patches_id of the call.
    key_values: (blocks, image tokens, 2 * hidden), or None if they are recomputed.
    """

    sigma: float
    inputs: ModelInputs
    weight_patches_id: object
    key_values: torch.Tensor | None


class SourceKVCache(NamedTuple):
    """Everything that edits need from a source. A tuple, so that ComfyUI's cache can count the memory of its tensors.

    schedule_description: the schedule that edits have to use, for messages. patches: the source model's patches of this
    pack. latent_shape: (channels, height, width), without the batch dimension that ForwardContext.latent_shape has.
    num_bytes: size of the keys and values. initial_noise: first latent of the trajectory, (1, channels, height, width);
    None for a source sampled from a seed.
    """

    schedule_description: str
    num_steps: int
    block_indices: tuple[int, ...]
    model: ModelFingerprint
    patches: tuple[ModelPatch, ...]
    latent_shape: tuple[int, ...]
    num_bytes: int
    initial_noise: torch.Tensor | None
    cached_steps: list[CachedStep]

    @property
    def in_memory(self) -> bool:
        """Whether keys and values are in memory; else they are recomputed during each edit."""
        return all(step.key_values is not None for step in self.cached_steps)

    def step_at(self, sigma: float) -> CachedStep:
        """The source's model call at a noise level. Raises SliderError when there was none."""
        nearest = min(self.cached_steps, key=lambda step: abs(step.sigma - sigma))
        if abs(nearest.sigma - sigma) > _SIGMA_TOLERANCE:
            raise SliderError(
                f"The source was not computed at noise level {sigma:.4f}; the nearest one is {nearest.sigma:.4f}. "
                f"Sample the edits with the source's schedule ({self.schedule_description}) and one of the samplers "
                f"{', '.join(ONE_CALL_PER_STEP)}."
            )
        return nearest

    def digest(self) -> str:
        """Hash of the source's first model call: equal for equal sources."""
        inputs, digest = self.cached_steps[0].inputs, hashlib.sha256()
        for tensor in (inputs.x, inputs.c_crossattn):
            if tensor is not None:
                digest.update(tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """Size of the cache and cost of an edit, for the user."""
        size = f"{self.num_steps} steps x {len(self.block_indices)} layers: {_format_bytes(self.num_bytes)}"
        if self.in_memory:
            return f"{size} of keys and values in RAM. An edit costs one generation."
        return (
            f"{size} of keys and values, too much for the memory. The source is recomputed with every edit, which "
            "costs two generations. Choose fewer layers, fewer steps or a smaller image, or raise memory_limit_gb."
        )


def kv_num_bytes(model: ModelPatcher, block_indices: Sequence[int], latent_shape: Sequence[int], steps: int) -> int:
    """Size of the keys and values of a source with this latent shape, in bytes."""
    num_values = steps * math.prod(KVSlots(model, block_indices).shape(latent_shape))
    return num_values * model.model.get_dtype_inference().itemsize


def describe_memory(
    model: ModelPatcher,
    block_indices: Sequence[int],
    latent_shape: Sequence[int],
    steps: int,
    memory_limit_gb: float = 0.0,
) -> str:
    """How much RAM a source will take, as text for the user. memory_limit_gb: as in cache_source_kv."""
    num_bytes, available = kv_num_bytes(model, block_indices, latent_shape, steps), _available_bytes(memory_limit_gb)
    text = f"The source takes {_format_bytes(num_bytes)} of RAM; {_format_bytes(available)} may be used."
    return text if num_bytes <= available else f"{text} That is too much, so it is recomputed with every edit."


def _available_bytes(memory_limit_gb: float) -> int:
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    return int(min(memory_limit_gb * 1e9, free) if memory_limit_gb else _FRACTION_OF_FREE_MEMORY * free)


def cache_source_kv(
    model: ModelPatcher,
    conditioning: Conditioning,
    latent: torch.Tensor,
    noise: torch.Tensor,
    block_indices: Sequence[int],
    settings: SamplingSettings,
    memory_limit_gb: float = 0.0,
    on_step: OnStep | None = None,
) -> tuple[SourceKVCache, torch.Tensor]:
    """Sample a source from noise at cfg 1, and return its cache and its latent.

    latent: (1, channels, height, width), empty; noise: of the same shape. settings.sampler: one of ONE_CALL_PER_STEP.
    memory_limit_gb: RAM that the cache may take, in 10^9 bytes; 0 for half of the free RAM.
    Raises SliderError for a batch, other samplers, blocks that the model does not have, and when nodes on the model or
    the conditioning prevent some keys and values from being computed or cached.
    """
    if settings.sampler not in ONE_CALL_PER_STEP:
        raise SliderError(
            f"The sampler {settings.sampler!r} calls the model several times per step or adds noise of its own; "
            f"expected one of {', '.join(ONE_CALL_PER_STEP)}."
        )
    check_flow_matching(model)
    schedule_description = f"{settings.steps} steps, scheduler {settings.scheduler}"
    recorder = _Recorder(model, block_indices, latent.shape, settings.steps, schedule_description, memory_limit_gb)
    samples = settings.sample(recorder.model, conditioning, latent, noise, on_step)
    return recorder.result(), samples


def cache_trajectory_kv(
    model: ModelPatcher,
    trajectory: Trajectory,
    block_indices: Sequence[int],
    memory_limit_gb: float = 0.0,
    on_step: OnStep | None = None,
) -> SourceKVCache:
    """The cache of an inverted image, for edits of its trajectory. memory_limit_gb: as in cache_source_kv.

    Raises SliderError for a trajectory of another model and for blocks that the model does not have.
    """
    trajectory.check_model(model)
    check_flow_matching(model)
    initial_noise = trajectory.latents[:1]
    schedule_description = f"the trajectory's {trajectory.steps} steps"
    recorder = _Recorder(
        model,
        block_indices,
        initial_noise.shape,
        trajectory.steps,
        schedule_description,
        memory_limit_gb,
        initial_noise,
    )
    sampler, empty = _TrajectoryReplay(trajectory), torch.zeros_like(initial_noise)
    run_sampler(recorder.model, trajectory.conditioning(), sampler, trajectory.sigmas, empty, on_step)
    return recorder.result()


def inject_cached(
    model: ModelPatcher, cache: SourceKVCache, strength: float = 1.0, region: ActiveRegion = EVERYWHERE
) -> ModelPatcher:
    """A clone of `model` that samples every image with the cached source's K and V.

    strength, region: as in vital_layers.inject_key_values. Raises SliderError for a cache of another model and for
    invalid or several masks; when sampling, for another size or schedule, samplers that add noise, and a mask combined
    with a conditioning area.
    """
    cache.model.check(model, "The cached source")
    weight = InjectionWeight(strength, region)
    injection = _CachedInjection(KVSlots(model, cache.block_indices), cache, weight)
    return weight.add_sampling_checks(add_patch(model, injection))


def check_cached_source(model: ModelPatcher, trajectory: Trajectory) -> None:
    """Raise SliderError unless `model` injects the cache of this trajectory."""
    caches = [patch.cache for patch in patches_of(model) if isinstance(patch, _CachedInjection)]
    if not caches:
        raise SliderError(
            f"The model has no cached source; expected a model from '{names.KEEP_CACHED_SOURCE}'. Connect one, or "
            "choose a source that is in the batch."
        )
    initial_noise = trajectory.latents[:1]
    noises = [cache.initial_noise for cache in caches if cache.initial_noise is not None]
    if not any(torch.equal(noise, initial_noise) for noise in noises):
        raise SliderError(
            f"The model's cached source is not this trajectory. Link the same trajectory to '{names.CACHE_TRAJECTORY}' "
            f"and '{names.EDIT_INVERTED_IMAGE}'."
        )


class _Recorder:
    """A patched model that records its calls; once it has been sampled, result() returns the cache."""

    def __init__(
        self,
        model: ModelPatcher,
        block_indices: Sequence[int],
        latent_shape: Sequence[int],
        num_steps: int,
        schedule_description: str,
        memory_limit_gb: float,
        initial_noise: torch.Tensor | None = None,
    ):
        if latent_shape[0] != 1:
            raise SliderError(f"The latent has {latent_shape[0]} images; expected one, the source.")
        num_bytes = kv_num_bytes(model, block_indices, latent_shape, num_steps)
        self.cache = SourceKVCache(
            schedule_description,
            num_steps,
            tuple(dict.fromkeys(block_indices)),
            fingerprint_of(model),
            patches_of(model),
            tuple(latent_shape[1:]),
            num_bytes,
            initial_noise,
            [],
        )
        keep = num_bytes <= _available_bytes(memory_limit_gb)
        self.model = add_patch(model, _Recording(KVSlots(model, block_indices), self.cache, keep))

    def result(self) -> SourceKVCache:
        """The complete cache. Raises SliderError when steps, or keys and values of a step, are missing."""
        steps = self.cache.cached_steps
        if len(steps) != self.cache.num_steps:
            raise SliderError(
                f"The source was computed in {len(steps)} model calls; expected one in each of its "
                f"{self.cache.num_steps} steps. Remove timestep ranges from its conditioning."
            )
        if self.cache.in_memory:
            for step in steps:
                _check_written(step.key_values)
            steps[:] = [step._replace(key_values=_pinned(step.key_values)) for step in steps]
        return self.cache


_NOT_WRITTEN = float("nan")


def _check_written(key_values: torch.Tensor | None) -> None:
    if key_values is None or key_values[:, 0, 0].isnan().any():
        raise SliderError(
            "Some layers of the source were not computed in a step, or their output is NaN: a node on its model skips "
            "them (EasyCache, layer skipping). Remove it from the source's model, or do not choose these layers."
        )


def _pinned(key_values: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor in pinned memory, which a GPU reads faster, where ComfyUI allows it; unpinned when collected."""
    if key_values is None or not comfy.model_management.pin_memory(key_values):
        return key_values
    view = key_values.view_as(key_values)
    weakref.finalize(view, comfy.model_management.unpin_memory, key_values)
    return view


def _allocate_kv(slots: KVSlots, context: ForwardContext, device: torch.device) -> torch.Tensor:
    """Memory for the keys and values of one call: (blocks, tokens, 2 * hidden), each block marked as not written."""
    key_values = torch.empty(slots.shape(context.latent_shape), dtype=context.dtype, device=device)
    key_values[:, 0, 0] = _NOT_WRITTEN
    return key_values


def _capture_kv(slots: KVSlots, context: ForwardContext, key_values: torch.Tensor) -> Mapping[str, ForwardWrapper]:
    """Wrappers that copy K and V of the first image into key_values; they do not change the model's output."""

    def capture(index: int, kv: torch.Tensor) -> None:
        key_values[index].copy_(kv[0])

    return slots.forward_wrappers(context, capture)


class _Recording(ModelPatch):
    """Records every model call of a source, with its K and V as long as there is memory for them."""

    phase = Phase.OBSERVE

    def __init__(self, slots: KVSlots, cache: SourceKVCache, keep: bool):
        self.slots, self.cache, self.keep = slots, cache, keep

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        self._check(context)
        steps, key_values = self.cache.cached_steps, None
        if self.keep:
            try:
                key_values = _allocate_kv(self.slots, context, torch.device("cpu"))
            except (RuntimeError, MemoryError):
                self.keep = False
                steps[:] = [step._replace(key_values=None) for step in steps]
        previous = steps[-1].inputs if steps else None
        inputs = _copied_to(context.inputs, torch.device("cpu"), previous)
        steps.append(CachedStep(context.sigma.item(), inputs, context.weight_patches_id, key_values))
        return {} if key_values is None else _capture_kv(self.slots, context, key_values)

    def _check(self, context: ForwardContext) -> None:
        if context.num_images * context.num_conds != 1:
            raise SliderError(
                "The source has several conditionings or images, or a node on its model computes the negative prompt "
                "too (SAG, for example); expected one conditioning and one image."
            )
        if tuple(context.latent_shape[1:]) != self.cache.latent_shape:
            raise SliderError(
                f"The source's conditioning covers {_size(context.latent_shape[1:])} of a latent of "
                f"{_size(self.cache.latent_shape)}; expected the entire latent. Remove the area from the conditioning."
            )
        if context.inputs.control is not None:
            raise SliderError("The source has a ControlNet, whose effect cannot be cached. Remove it from the source.")


class _Capture(ModelPatch):
    """Keeps K and V of one model call, on the call's device."""

    phase = Phase.OBSERVE

    def __init__(self, slots: KVSlots):
        self.slots = slots
        self.key_values: torch.Tensor | None = None

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        self.key_values = _allocate_kv(self.slots, context, context.device)
        return _capture_kv(self.slots, context, self.key_values)


class _CachedInjection(ModelPatch):
    """Replaces K and V of the image tokens of every image with those of a cached source."""

    phase = Phase.REPLACE
    batch_independent = True

    def __init__(self, slots: KVSlots, cache: SourceKVCache, weight: InjectionWeight):
        self.slots, self.cache, self.weight = slots, cache, weight
        self._digest = cache.digest()

    @property
    def sort_key(self) -> tuple[Any, ...]:
        return ("from a cache", self._digest)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        if tuple(context.latent_shape[1:]) != self.cache.latent_shape:
            raise SliderError(
                f"The cached source has a latent of {_size(self.cache.latent_shape)}, this image one of "
                f"{_size(context.latent_shape[1:])}; expected the same size. Use the same latent for both."
            )
        step = self.cache.step_at(context.sigma.item())
        if not self.weight.is_active(context):
            return {}
        source = self._recomputed(context, step) if step.key_values is None else step.key_values
        weights = self.weight.token_weights(self.slots, context)
        non_blocking = comfy.model_management.device_supports_non_blocking(context.device)

        def inject(index: int, kv: torch.Tensor) -> None:
            kv.lerp_(source[index].to(kv, non_blocking=non_blocking), weights.to(kv))

        return self.slots.forward_wrappers(context, inject)

    def _recomputed(self, context: ForwardContext, step: CachedStep) -> torch.Tensor:
        """K and V of the source's model call, which is run again within the edit's call."""
        if context.weight_patches_id != step.weight_patches_id:
            raise SliderError(
                "There is too little memory to keep the source, and it cannot be recomputed because this model has "
                "other LoRAs than the source's model. Give both the same LoRAs (from one LoRA node), or raise "
                "memory_limit_gb."
            )
        capture = _Capture(self.slots)
        context.run((*self.cache.patches, capture), _copied_to(step.inputs, context.device))
        _check_written(capture.key_values)
        assert capture.key_values is not None
        return capture.key_values


class _TrajectoryReplay(StepSampler):
    """Calls the model once at every noise level of a trajectory, with the trajectory's latent."""

    def __init__(self, trajectory: Trajectory):
        self.trajectory = trajectory

    def sample_loop(
        self, denoise: Denoise, sigmas: torch.Tensor, latent: torch.Tensor, on_step: OnStep
    ) -> torch.Tensor:
        for step, sigma in enumerate(sigmas[:-1]):
            x = self.trajectory.latents[step : step + 1].to(latent)
            on_step(step, denoise(x, sigma), x, len(sigmas) - 1)
        return latent


def _copied_to(inputs: ModelInputs, device: torch.device, previous: ModelInputs | None = None) -> ModelInputs:
    """A copy on a device that shares tensors equal to those of `previous`. transformer_options are not copied."""
    copied = _copied_value(inputs._replace(transformer_options={}), device, previous)
    return copied._replace(transformer_options=inputs.transformer_options)


def _copied_value(value: Any, device: torch.device, previous: Any) -> Any:
    if isinstance(value, torch.Tensor):
        is_tensor = isinstance(previous, torch.Tensor)
        if is_tensor and previous.shape == value.shape and torch.equal(previous, value.to(previous)):
            return previous
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        previous = previous or {}
        return {key: _copied_value(item, device, previous.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        previous = previous if previous is not None and len(previous) == len(value) else [None] * len(value)
        items = [_copied_value(item, device, other) for item, other in zip(value, previous)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _size(latent_shape: Sequence[int]) -> str:
    return f"{latent_shape[-1]} x {latent_shape[-2]}"


def _format_bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
