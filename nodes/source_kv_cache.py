"""Nodes that cache a source's keys and values, so that each edit costs one generation instead of two."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..slider_core import node_names as names
from ..slider_core.conditioning.active_region import ActiveRegion
from ..slider_core.sampling.deterministic_samplers import ONE_CALL_PER_STEP
from ..slider_core.sampling.sampling_settings import SamplingSettings
from ..slider_core.stable_flow.source_kv_cache import (
    SourceKVCache,
    cache_source_kv,
    cache_trajectory_kv,
    describe_memory,
    inject_cached,
)
from ..slider_core.stable_flow.trajectory import Trajectory
from ..slider_core.types import Conditioning
from .common import categories
from .common.inputs import (
    end_input,
    injection_mask_input,
    injection_strength_input,
    layer_inputs,
    memory_limit_input,
    parse_layers,
    seed_input,
    start_input,
    steps_input,
)
from .common.latents import noise_for, prepare_latent
from .common.progress import previews, show_text
from .common.sockets import KVCacheSocket, TrajectorySocket

SEARCH_ALIASES = ["stable flow", "kv cache", "key value cache", "cached reference"]


class CacheSource(io.ComfyNode):
    """Samples a source and caches its keys and values for edits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersRememberSource",
            display_name=names.CACHE_SOURCE,
            category=categories.STABLE_FLOW,
            description="Samples a source as KSampler does at cfg 1, and caches the keys and values of its vital "
            f"layers in RAM. {names.KEEP_CACHED_SOURCE} injects them into edits, which then cost one generation each "
            "instead of two.",
            search_aliases=["remember source", *SEARCH_ALIASES],
            inputs=[
                io.Model.Input("model", tooltip=f"FLUX.1 dev, without {names.KEEP_SOURCE}."),
                io.Conditioning.Input("conditioning", tooltip="The source prompt, after FluxGuidance."),
                io.Latent.Input("latent", tooltip="One empty latent."),
                *layer_inputs(),
                seed_input("Noise seed. Use the same one in the KSampler of the edits."),
                steps_input("Sampling steps. Use the same number in the KSampler of the edits."),
                io.Combo.Input(
                    "sampler_name",
                    options=list(ONE_CALL_PER_STEP),
                    tooltip="The samplers that evaluate the model once per step and add no noise.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="Use the same scheduler in the KSampler of the edits.",
                ),
                memory_limit_input(),
            ],
            outputs=[
                KVCacheSocket.Output("remembered", display_name="kv_cache", tooltip=f"For {names.KEEP_CACHED_SOURCE}."),
                io.Latent.Output(tooltip="The sampled source."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        conditioning: Conditioning,
        latent: dict,
        layers: str,
        list: str,
        seed: int,
        steps: int,
        sampler_name: str,
        scheduler: str,
        memory_limit: float,
    ) -> io.NodeOutput:
        blocks, empty = parse_layers(model, layers, list), prepare_latent(model, latent)
        show_text(cls, describe_memory(model, blocks, empty.shape, steps, memory_limit))
        on_step = previews(model, steps)
        noise, settings = noise_for(model, latent, seed), SamplingSettings(steps, seed, sampler_name, scheduler)
        cache, samples = cache_source_kv(model, conditioning, empty, noise, blocks, settings, memory_limit, on_step)
        return io.NodeOutput(cache, {"samples": samples}, ui=ui.PreviewText(cache.describe()))


class CacheTrajectory(io.ComfyNode):
    """Caches the keys and values of an inverted image for edits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersRememberTrajectory",
            display_name=names.CACHE_TRAJECTORY,
            category=categories.STABLE_FLOW,
            description="Caches the keys and values of an inverted image's vital layers in RAM, so that each edit from "
            "its trajectory costs one generation instead of two.",
            search_aliases=["remember trajectory", *SEARCH_ALIASES],
            inputs=[
                io.Model.Input("model", tooltip="The model that the image was inverted with."),
                TrajectorySocket.Input("trajectory", tooltip=f"From {names.INVERT_IMAGE} or {names.LOAD_TRAJECTORY}."),
                *layer_inputs(),
                memory_limit_input(),
            ],
            outputs=[
                KVCacheSocket.Output("remembered", display_name="kv_cache", tooltip=f"For {names.KEEP_CACHED_SOURCE}.")
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, trajectory: Trajectory, layers: str, list: str, memory_limit: float
    ) -> io.NodeOutput:
        blocks, latent = parse_layers(model, layers, list), trajectory.latents[:1]
        show_text(cls, describe_memory(model, blocks, latent.shape, trajectory.steps, memory_limit))
        on_step = previews(model, trajectory.steps)
        cache = cache_trajectory_kv(model, trajectory, blocks, memory_limit, on_step)
        return io.NodeOutput(cache, ui=ui.PreviewText(cache.describe()))


class KeepCachedSource(io.ComfyNode):
    """Injects a cached source's keys and values into every image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersInjectRememberedSource",
            display_name=names.KEEP_CACHED_SOURCE,
            category=categories.STABLE_FLOW,
            description=f"Every image uses the cached keys and values of the source, as with {names.KEEP_SOURCE}, but "
            "the source is not generated again.",
            search_aliases=["inject remembered source", *SEARCH_ALIASES],
            inputs=[
                io.Model.Input("model", tooltip="The model that the source was cached with."),
                KVCacheSocket.Input(
                    "remembered",
                    display_name="kv_cache",
                    tooltip=f"From {names.CACHE_SOURCE} or {names.CACHE_TRAJECTORY}.",
                ),
                injection_strength_input(),
                start_input(advanced=True),
                end_input(advanced=True),
                injection_mask_input(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="For a KSampler with the source's seed, steps, scheduler and size; for a cached "
                    f"trajectory, for {names.EDIT_INVERTED_IMAGE}."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        remembered: SourceKVCache,
        preservation: float,
        start: float,
        end: float,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(inject_cached(model, remembered, preservation, ActiveRegion(mask, start, end)))


NODES: list[type[io.ComfyNode]] = [CacheSource, CacheTrajectory, KeepCachedSource]
