"""Nodes that compute a source once, so that every later edit costs one generation instead of two."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

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
from .common.latents import fitting_latent, noise_for
from .common.layer_inputs import chosen_layers, injection_mask_input, layer_inputs, part_inputs, preservation_input
from .common.progress import previews, say
from .common.sockets import CATEGORY, KVCacheSocket, TrajectorySocket, seed_input


def _memory_input() -> io.Float.Input:
    return io.Float.Input(
        "memory_limit",
        default=0.0,
        min=0.0,
        max=4096.0,
        step=0.5,
        advanced=True,
        tooltip="GB of RAM that the source may take; 0 = half of what is free. What takes more is computed again with "
        "every edit.",
    )


class RememberSource(io.ComfyNode):
    """Samples a source, and keeps what its edits need of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersRememberSource",
            display_name="Remember Source",
            category=CATEGORY,
            description="Samples a source as KSampler does at cfg 1, and keeps keys and values of its vital layers in "
            "RAM. Inject Remembered Source gives them to edits, which then cost one generation each instead of two.",
            search_aliases=["stable flow", "cached reference", "key value cache"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 dev, without Inject Vital Layers."),
                io.Conditioning.Input("conditioning", tooltip="The source prompt, after FluxGuidance."),
                io.Latent.Input("latent", tooltip="One empty latent."),
                *layer_inputs(),
                seed_input("Of the noise. Give the edits' KSampler the same."),
                io.Int.Input("steps", default=15, min=1, max=1000, tooltip="Give the edits' KSampler the same."),
                io.Combo.Input(
                    "sampler_name",
                    options=list(ONE_CALL_PER_STEP),
                    tooltip="Those that call the model once per step and add no noise.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="Give the edits' KSampler the same.",
                ),
                _memory_input(),
            ],
            outputs=[
                KVCacheSocket.Output("remembered", tooltip="For Inject Remembered Source."),
                io.Latent.Output(tooltip="The source itself."),
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
        chosen, empty = chosen_layers(model, layers, list), fitting_latent(model, latent)
        say(cls, describe_memory(model, chosen, empty.shape, steps, memory_limit))
        on_step = previews(model, steps)
        noise, settings = noise_for(model, latent, seed), SamplingSettings(steps, seed, sampler_name, scheduler)
        cache, samples = cache_source_kv(model, conditioning, empty, noise, chosen, settings, memory_limit, on_step)
        return io.NodeOutput(cache, {"samples": samples}, ui=ui.PreviewText(cache.describe()))


class RememberTrajectory(io.ComfyNode):
    """Keeps what edits of an inverted picture need of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersRememberTrajectory",
            display_name="Remember Trajectory",
            category=CATEGORY,
            description="Keeps keys and values of the vital layers of an inverted picture in RAM, so that each edit "
            "from its trajectory costs one generation instead of two.",
            search_aliases=["stable flow", "cached reference", "key value cache"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the picture was inverted with."),
                TrajectorySocket.Input("trajectory", tooltip="From Invert Photograph or Load Trajectory."),
                *layer_inputs(),
                _memory_input(),
            ],
            outputs=[KVCacheSocket.Output("remembered", tooltip="For Inject Remembered Source.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, trajectory: Trajectory, layers: str, list: str, memory_limit: float
    ) -> io.NodeOutput:
        chosen, latent = chosen_layers(model, layers, list), trajectory.latents[:1]
        say(cls, describe_memory(model, chosen, latent.shape, trajectory.steps, memory_limit))
        on_step = previews(model, trajectory.steps)
        cache = cache_trajectory_kv(model, trajectory, chosen, memory_limit, on_step)
        return io.NodeOutput(cache, ui=ui.PreviewText(cache.describe()))


class InjectRememberedSource(io.ComfyNode):
    """Lets every picture keep what a remembered source shows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersInjectRememberedSource",
            display_name="Inject Remembered Source",
            category=CATEGORY,
            description="Every picture takes keys and values of the remembered layers from the source, as with Inject "
            "Vital Layers, but the source is not rendered again.",
            search_aliases=["stable flow", "cached reference", "key value cache"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the source was remembered with."),
                KVCacheSocket.Input("remembered", tooltip="From Remember Source or Remember Trajectory."),
                preservation_input(),
                *part_inputs(),
                injection_mask_input(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="For a KSampler with the source's seed, steps, scheduler and size; for a remembered "
                    "trajectory, for Edit from Trajectory."
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
