"""Keys and values of a source, computed once and injected into every later edit (Stable Flow's injection, cached).

Where they do not fit into memory, the source is computed again beside each model call of an edit.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

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
from ..types import Conditioning, OnStep
from .trajectory import Trajectory
from .vital_layers import InjectionWeight, KVSlots

_SHARE_OF_FREE_MEMORY = 0.5
_SAME_SIGMA = 1e-4


class _CachedStep(NamedTuple):
    """One model call of the source. key_values: (layers, tokens, 2 * width), or None where they are not kept."""

    sigma: float
    inputs: ModelInputs
    weights: object
    key_values: torch.Tensor | None


class SourceKVCache(NamedTuple):
    """What a source leaves behind for its edits. A tuple, so that ComfyUI's cache sees how much memory it holds.

    how: the schedule that edits have to follow, in words. latent: (channels, height, width).
    needed: bytes that its keys and values take. start: the noise of its trajectory, if it has one.
    """

    how: str
    steps: int
    layers: tuple[int, ...]
    model: ModelFingerprint
    patches: tuple[ModelPatch, ...]
    latent: tuple[int, ...]
    needed: int
    start: torch.Tensor | None
    moments: list[_CachedStep]

    @property
    def kept(self) -> bool:
        """Whether keys and values are in memory."""
        return all(moment.key_values is not None for moment in self.moments)

    def at(self, sigma: float) -> _CachedStep:
        """The source's call at a noise level. Raises SliderError when there was none."""
        nearest = min(self.moments, key=lambda moment: abs(moment.sigma - sigma))
        if abs(nearest.sigma - sigma) > _SAME_SIGMA:
            raise SliderError(
                f"The source was not computed at noise level {sigma:.4f}, the nearest is {nearest.sigma:.4f}. "
                f"Sample edits with the same schedule as the source ({self.how}) and one of the samplers "
                f"{', '.join(ONE_CALL_PER_STEP)}."
            )
        return nearest

    def digest(self) -> str:
        """Hash of the source's first model call: equal for equal sources."""
        inputs, digest = self.moments[0].inputs, hashlib.sha256()
        for tensor in (inputs.x, inputs.c_crossattn):
            if tensor is not None:
                digest.update(tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """What is kept, for the user."""
        size = f"{self.steps} steps x {len(self.layers)} layers: {_gigabytes(self.needed)}"
        if self.kept:
            return f"{size} of keys and values in RAM. An edit costs one generation."
        return (
            f"{size} of keys and values, too much for the memory. The source is computed again with every edit, which "
            "costs two generations. Choose fewer layers, fewer steps or a smaller picture, or raise the limit."
        )


def memory_needed(model: ModelPatcher, layers: Sequence[int], latent: Sequence[int], steps: int) -> int:
    """Bytes of the keys and values of a source of this latent shape."""
    return steps * math.prod(KVSlots(model, layers).shape(latent)) * model.model.get_dtype_inference().itemsize


def describe_need(
    model: ModelPatcher, layers: Sequence[int], latent: Sequence[int], steps: int, limit: float = 0.0
) -> str:
    """What remembering will take of memory, for the user to see before it does. limit: as in cache_source_kv."""
    needed, allowed = memory_needed(model, layers, latent, steps), _allowed(limit)
    found = f"The source takes {_gigabytes(needed)} of RAM ({_gigabytes(allowed)} may be used)"
    return f"{found}." if needed <= allowed else f"{found}: too much, it will be computed again with every edit."


def _allowed(limit: float) -> int:
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    return int(min(limit * 1e9, free) if limit else _SHARE_OF_FREE_MEMORY * free)


def cache_source_kv(
    model: ModelPatcher,
    conditioning: Conditioning,
    latent: torch.Tensor,
    noise: torch.Tensor,
    layers: Sequence[int],
    seed: int,
    steps: int,
    sampler: str,
    scheduler: str,
    limit: float = 0.0,
    on_step: OnStep | None = None,
) -> tuple[SourceKVCache, torch.Tensor]:
    """Sample a source from noise, as KSampler does at cfg 1; what its edits need, and its latent.

    latent: (1, channels, height, width), empty; noise: as large. sampler: one of ONE_CALL_PER_STEP. limit: GB of memory
    that may be used, 0 for half of what is free.
    Raises SliderError for a batch, other samplers, absent layers, and where nodes on the model or the conditioning keep
    some of its keys and values from being computed.
    """
    if sampler not in ONE_CALL_PER_STEP:
        raise SliderError(
            f"The sampler {sampler!r} calls the model several times per step or adds noise of its own; expected one "
            f"of {', '.join(ONE_CALL_PER_STEP)}."
        )
    check_flow_matching(model)
    how = f"{steps} steps, scheduler {scheduler}"
    recorder = _Recorder(model, layers, latent.shape, steps, how, limit)
    samples = comfy.sample.sample(
        recorder.model,
        noise,
        steps,
        1.0,
        sampler,
        scheduler,
        conditioning,
        conditioning,
        latent,
        callback=on_step,
        disable_pbar=True,
        seed=seed,
    )
    return recorder.finished(), samples


def cache_trajectory_kv(
    model: ModelPatcher,
    trajectory: Trajectory,
    layers: Sequence[int],
    limit: float = 0.0,
    on_step: OnStep | None = None,
) -> SourceKVCache:
    """What edits from a trajectory need, so that the source need not be in their batch. limit: as cache_source_kv.

    Raises SliderError for a trajectory of another model and for absent layers.
    """
    trajectory.check_model(model)
    check_flow_matching(model)
    latent = trajectory.latents[:1]
    how = f"the trajectory's {trajectory.steps} steps"
    recorder = _Recorder(model, layers, latent.shape, trajectory.steps, how, limit, latent)
    visits = _TrajectoryReplay(trajectory)
    run_sampler(recorder.model, trajectory.conditioning(), visits, trajectory.sigmas, torch.zeros_like(latent), on_step)
    return recorder.finished()


def inject_cached(
    model: ModelPatcher,
    cache: SourceKVCache,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    mask: torch.Tensor | None = None,
) -> ModelPatcher:
    """A clone of `model` that renders every picture with the cached source's K and V.

    strength, start, end, mask: as in vital_layers.inject_key_values. Raises SliderError for a cache of another model, a
    part that ends before it starts and a mask that is none or several; when sampling, for another size or schedule, and
    samplers that add noise.
    """
    cache.model.check(model, "The remembered source")
    share = InjectionWeight(strength, start, end, mask)
    return share.applied(add_patch(model, _CachedInjection(KVSlots(model, cache.layers), cache, share)))


def check_cached_source(model: ModelPatcher, trajectory: Trajectory) -> None:
    """Raise SliderError unless `model` injects what was remembered of this trajectory."""
    caches = [patch.cache for patch in patches_of(model) if isinstance(patch, _CachedInjection)]
    if not caches:
        raise SliderError(
            "The model remembers no source; expected one from 'Inject Remembered Source'. Connect it, or let the "
            "source be in the batch."
        )
    start = trajectory.latents[0]
    if not any(cache.start is not None and torch.equal(cache.start[0], start) for cache in caches):
        raise SliderError(
            "The model remembers another source than this trajectory. Use one trajectory for 'Remember Trajectory' and "
            "'Edit from Trajectory'."
        )


class _Recorder:
    """A model that notes its calls; once it has been sampled, they are finished()."""

    def __init__(
        self,
        model: ModelPatcher,
        layers: Sequence[int],
        latent: Sequence[int],
        steps: int,
        how: str,
        limit: float,
        start: torch.Tensor | None = None,
    ):
        if latent[0] != 1:
            raise SliderError(f"The latent has {latent[0]} pictures; expected one, the source.")
        places, needed = KVSlots(model, layers), memory_needed(model, layers, latent, steps)
        identity, patches = fingerprint_of(model), patches_of(model)
        self.cache = SourceKVCache(
            how, steps, tuple(dict.fromkeys(layers)), identity, patches, tuple(latent[1:]), needed, start, []
        )
        self.model = add_patch(model, _Recording(places, self.cache, keep=needed <= _allowed(limit)))

    def finished(self) -> SourceKVCache:
        """The cache, complete. Raises SliderError when something kept the model from computing all of it."""
        moments = self.cache.moments
        if len(moments) != self.cache.steps:
            raise SliderError(
                f"The source was computed in {len(moments)} model calls; expected one in each of its "
                f"{self.cache.steps} steps. Take time ranges off its conditioning."
            )
        if self.cache.kept:
            for moment in moments:
                _check_written(moment.key_values)
            moments[:] = [moment._replace(key_values=_pinned(moment.key_values)) for moment in moments]
        return self.cache


_NOT_WRITTEN = float("nan")


def _check_written(key_values: torch.Tensor | None) -> None:
    if key_values is None or key_values[:, 0, 0].isnan().any():
        raise SliderError(
            "Some layers of the source were not computed in a step, or gave no numbers: a node on its model skips them "
            "(EasyCache, layer skipping). Take it off the source's model, or do not choose those layers."
        )


def _pinned(key_values: torch.Tensor | None) -> torch.Tensor | None:
    """The same in memory that a GPU reads faster, for as long as it is used, where ComfyUI allows that."""
    if key_values is None or not comfy.model_management.pin_memory(key_values):
        return key_values
    used = key_values.view_as(key_values)
    weakref.finalize(used, comfy.model_management.unpin_memory, key_values)
    return used


def _allocate_kv(places: KVSlots, context: ForwardContext, device: torch.device) -> torch.Tensor:
    """Memory for keys and values of one call: (layers, tokens, 2 * width), each layer marked as not written."""
    room = torch.empty(places.shape(context.latent_shape), dtype=context.dtype, device=device)
    room[:, 0, 0] = _NOT_WRITTEN
    return room


def _capture_kv(places: KVSlots, context: ForwardContext, room: torch.Tensor) -> Mapping[str, ForwardWrapper]:
    def keep(layer: int, part: torch.Tensor) -> None:
        room[layer].copy_(part[0])

    return places.changed(context, keep)


class _Recording(ModelPatch):
    """Operation: notes every call of a source, with K and V while memory lasts."""

    phase = Phase.OBSERVE

    def __init__(self, places: KVSlots, cache: SourceKVCache, keep: bool):
        self.places, self.cache, self.keep = places, cache, keep

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        if context.num_images * context.num_conds != 1:
            raise SliderError(
                "The source has several conditionings or pictures, or a node on its model computes the negative prompt "
                "too (SAG, for example); expected one conditioning and one picture."
            )
        if tuple(context.latent_shape[1:]) != self.cache.latent:
            raise SliderError(
                f"The source's conditioning covers {_size(context.latent_shape[1:])} of a latent of "
                f"{_size(self.cache.latent)}; expected all of it. Take the area off the conditioning."
            )
        if context.inputs.control is not None:
            raise SliderError("The source has a ControlNet, whose effect cannot be kept. Take it off the source.")
        moments, key_values = self.cache.moments, None
        if self.keep:
            try:
                key_values = _allocate_kv(self.places, context, torch.device("cpu"))
            except (RuntimeError, MemoryError):
                self.keep = False
                moments[:] = [moment._replace(key_values=None) for moment in moments]
        known = moments[-1].inputs if moments else None
        inputs = _moved(context.inputs, torch.device("cpu"), known)
        moments.append(_CachedStep(context.sigma.item(), inputs, context.weight_patches_id, key_values))
        return {} if key_values is None else _capture_kv(self.places, context, key_values)


class _Capture(ModelPatch):
    """Operation: takes the K and V of one call, on its device."""

    phase = Phase.OBSERVE

    def __init__(self, places: KVSlots):
        self.places = places
        self.key_values: torch.Tensor | None = None

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        self.key_values = _allocate_kv(self.places, context, context.device)
        return _capture_kv(self.places, context, self.key_values)


class _CachedInjection(ModelPatch):
    """Operation: K and V of the image tokens of every picture become those of a cached source."""

    phase = Phase.REPLACE
    batch_independent = True

    def __init__(self, places: KVSlots, cache: SourceKVCache, share: InjectionWeight):
        self.places, self.cache, self.share = places, cache, share
        self._digest = cache.digest()

    @property
    def rank(self) -> tuple[Any, ...]:
        return ("from a cache", self._digest)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        if tuple(context.latent_shape[1:]) != self.cache.latent:
            raise SliderError(
                f"The remembered source has a latent of {_size(self.cache.latent)}, this picture one of "
                f"{_size(context.latent_shape[1:])}; expected the same size. Use one latent for both."
            )
        moment = self.cache.at(context.sigma.item())
        if not self.share.acts(context):
            return {}
        kept = moment.key_values
        source = self._computed_again(context, moment) if kept is None else kept
        share = self.share.of_tokens(self.places, context)
        soon = comfy.model_management.device_supports_non_blocking(context.device)

        def inject(layer: int, part: torch.Tensor) -> None:
            part.lerp_(source[layer].to(part, non_blocking=soon), share.to(part))

        return self.places.changed(context, inject)

    def _computed_again(self, context: ForwardContext, moment: _CachedStep) -> torch.Tensor:
        if context.weight_patches_id != moment.weights:
            raise SliderError(
                "There is too little memory to keep the source, and it cannot be computed again because this model has "
                "other LoRAs than the source's. Give both the same (from one LoRA node), or raise memory_limit."
            )
        capture = _Capture(self.places)
        context.run((*self.cache.patches, capture), _moved(moment.inputs, context.device))
        _check_written(capture.key_values)
        assert capture.key_values is not None
        return capture.key_values


class _TrajectoryReplay(StepSampler):
    """Calls the model once at every noise level of a trajectory, with the latent that lies there."""

    def __init__(self, trajectory: Trajectory):
        self.trajectory = trajectory

    def sample_loop(
        self, denoise: Denoise, sigmas: torch.Tensor, latent: torch.Tensor, on_step: OnStep
    ) -> torch.Tensor:
        for step, sigma in enumerate(sigmas[:-1]):
            x = self.trajectory.latents[step : step + 1].to(latent)
            on_step(step, denoise(x, sigma), x, len(sigmas) - 1)
        return latent


def _moved(inputs: ModelInputs, device: torch.device, known: ModelInputs | None = None) -> ModelInputs:
    """A copy on a device; tensors that `known` has too are taken from there. The options stay as they are."""
    moved = _moved_value(inputs._replace(transformer_options={}), device, known)
    return moved._replace(transformer_options=inputs.transformer_options)


def _moved_value(value: Any, device: torch.device, known: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if isinstance(known, torch.Tensor) and known.shape == value.shape and torch.equal(known, value.to(known)):
            return known
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        known = known or {}
        return {key: _moved_value(item, device, known.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        known = known if known is not None and len(known) == len(value) else [None] * len(value)
        items = [_moved_value(item, device, other) for item, other in zip(value, known)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _size(latent: Sequence[int]) -> str:
    return f"{latent[-1]} x {latent[-2]}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
