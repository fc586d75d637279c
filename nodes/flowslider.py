"""The sampler that edits from the source itself, FlowSlider."""

from __future__ import annotations

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.conditioning.schedule import check_schedule_range
from ..slider_core.sampling.flow_matching import scheduler_sigmas
from ..slider_core.strength import validate_strengths
from ..slider_core.training_free.flowslider import sample_flowslider
from ..slider_core.types import Conditioning
from .common import categories
from .common.inputs import end_input, seed_input, start_input, steps_input, strength_input
from .common.latents import noise_for
from .common.progress import previews
from .common.validation import strength_validator


class FlowSliderSamplerNode(io.ComfyNode):
    """Samples an edit from a source prompt to a target prompt, at one strength."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersFidelitySteering",
            display_name=names.FLOWSLIDER,
            category=categories.TRAINING_FREE,
            description="One strength for the whole edit, without an adapter, starting from the source itself: "
            "fidelity to the source plus strength times steering toward the target prompt (FlowSlider; strength 1 is "
            "FlowEdit). Replaces the sampler and evaluates the model three times per step.",
            search_aliases=["fidelity and steering", "flowedit", "inversion-free editing", "edit strength"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 or FLUX.1 Kontext."),
                io.Conditioning.Input(
                    "source",
                    tooltip="A prompt that describes the source; for Kontext, an instruction that changes nothing.",
                ),
                io.Conditioning.Input(
                    "target", tooltip="A prompt that describes the edited image; for Kontext, the instruction."
                ),
                io.Latent.Input(
                    "latent", tooltip="The source, from VAE Encode. A noise mask restricts the edit to its region."
                ),
                strength_input("strength"),
                seed_input(),
                steps_input("Sampling steps. Each evaluates the model three times.", default=28),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="Scheduler of the sampling steps, as in KSampler.",
                ),
                start_input(
                    "Fraction of the sampling schedule that is skipped at its noisy end. The more is skipped, the more "
                    "of the source's layout stays."
                ),
                end_input(
                    "Fraction of the sampling schedule after which the strength is 0. Those steps evaluate the model "
                    "twice.",
                    optional=True,
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    validate_inputs = strength_validator("strength")

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        source: Conditioning,
        target: Conditioning,
        latent: dict,
        strength: object,
        seed: int,
        steps: int,
        scheduler: str,
        start: float,
        end: float = 1.0,
    ) -> io.NodeOutput:
        check_schedule_range(start, end)
        values, samples = validate_strengths(strength, "strength"), latent["samples"]
        sigmas, noise = scheduler_sigmas(model, scheduler, steps, start), noise_for(model, latent, seed)
        on_step = previews(model, len(sigmas) - 1)
        mask = latent.get("noise_mask")
        edited = sample_flowslider(model, source, target, samples, noise, values, sigmas, seed, mask, end, on_step)
        return io.NodeOutput({"samples": edited})


NODES: list[type[io.ComfyNode]] = [FlowSliderSamplerNode]
