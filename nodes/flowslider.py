"""The node that edits from the source itself."""

from __future__ import annotations

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..slider_core.conditioning.schedule import check_schedule_range
from ..slider_core.sampling.flow_matching import scheduler_sigmas
from ..slider_core.strength import validate_strengths
from ..slider_core.training_free.flowslider import sample_flowslider
from ..slider_core.types import Conditioning
from .common.latents import noise_for
from .common.progress import previews
from .common.sockets import CATEGORY, OneStrength, seed_input, strength_input


class FidelitySteering(OneStrength, io.ComfyNode):
    """One strength for the whole edit, from a prompt of the source to a prompt of the edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersFidelitySteering",
            display_name="Fidelity and Steering",
            category=CATEGORY,
            description="One strength for the whole edit, without an adapter, from the source itself: fidelity to the "
            "source plus strength times steering towards the target prompt (FlowSlider; strength 1 is FlowEdit). Takes "
            "the place of the sampler, and calls the model three times per step.",
            search_aliases=["flowslider", "flowedit", "inversion-free editing", "edit strength"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 or FLUX.1 Kontext."),
                io.Conditioning.Input(
                    "source", tooltip="What the source shows; for Kontext, an instruction that changes nothing."
                ),
                io.Conditioning.Input("target", tooltip="What the edit shows; for Kontext, the instruction."),
                io.Latent.Input(
                    "latent", tooltip="The source, from VAEEncode. A noise mask tells where the edit may be."
                ),
                strength_input("strength"),
                seed_input("Of the noise."),
                io.Int.Input("steps", default=28, min=1, max=1000, tooltip="Each calls the model three times."),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="Of the steps' noise levels.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the schedule that is skipped, the noisiest: the more, the more of the source's "
                    "layout stays.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of the schedule after which the strength is 0. Those steps call the model twice.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

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
