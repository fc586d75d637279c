"""Nodes of Kontinuous Kontext's strength projector."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..slider_core.adapters.strength_projector import (
    ProjectorBundle,
    apply_projector,
    drop_projector_strength,
    read_projector,
    set_projector_strength,
)
from ..slider_core.strength import clamp_strengths, validate_strengths
from ..slider_core.types import Conditioning
from .common.files import fingerprint, names, path_of
from .common.sockets import CATEGORY, OneStrength, ProjectorSocket, strength_input

NO_LORA = "none, or in the projector's file"
CLAMP, FREE, DROP = "clamp to 0..1", "allow outside 0..1", "drop the strength"


class LoadProjector(io.ComfyNode):
    """Reads a strength projector and its LoRA, and says what they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = names()
        return io.Schema(
            node_id="EditSlidersLoadProjector",
            display_name="Load Strength Projector",
            category=CATEGORY,
            description="Loads Kontinuous Kontext's projector and the LoRA that was trained with it, both from the "
            "loras folder, and shows what they are.",
            search_aliases=["kontinuous kontext", "slider projector"],
            inputs=[
                io.Combo.Input("projector_name", options=files, tooltip="slider_projector.pth, or a .safetensors."),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *files],
                    tooltip="pytorch_lora_weights.safetensors from the same training. A projector without it gives "
                    "edits that are off.",
                ),
            ],
            outputs=[
                ProjectorSocket.Output("projector", tooltip="For Apply Strength Projector and Projector Strength."),
                io.String.Output("info", tooltip="Sizes of the projector, and what its LoRA is."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, projector_name: str, lora_name: str) -> io.NodeOutput:
        lora = None if lora_name == NO_LORA else path_of(lora_name)
        bundle = read_projector(path_of(projector_name), lora)
        return io.NodeOutput(bundle, bundle.describe(), ui=ui.PreviewText(bundle.describe()))

    @classmethod
    def fingerprint_inputs(cls, projector_name: str, lora_name: str) -> list[tuple[float, int]]:
        return [fingerprint(name) for name in (projector_name, lora_name) if name != NO_LORA]


class ApplyProjector(io.ComfyNode):
    """Lets a model obey the projector strengths of its conditionings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersApplyProjector",
            display_name="Apply Strength Projector",
            category=CATEGORY,
            description="Lets the model obey a strength for the whole edit, calibrated to the instruction. The "
            "strength comes with the conditioning (Projector Strength); a conditioning without one is left alone.",
            search_aliases=["kontinuous kontext"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 Kontext."),
                ProjectorSocket.Input("projector", tooltip="From Load Strength Projector."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, projector: ProjectorBundle) -> io.NodeOutput:
        return io.NodeOutput(apply_projector(model, projector))


class ProjectorStrength(OneStrength, io.ComfyNode):
    """Gives a conditioning its strength for the whole edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersProjectorStrength",
            display_name="Projector Strength",
            category=CATEGORY,
            description="From source (0) to the full edit (1), for the instruction of this conditioning.",
            search_aliases=["kontinuous kontext slider", "edit strength"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The encoded instruction, from any text encode node."),
                ProjectorSocket.Input("projector", tooltip="The one that is applied to the model."),
                strength_input(
                    "strength",
                    default=0.5,
                    low=-1.0,
                    high=2.0,
                    tooltip="0 = source, 1 = full edit. 0 is the projector's own zero, not the bare model. Link a list "
                    "of strengths to get one picture per value in one run.",
                ),
                io.Combo.Input(
                    "mode",
                    options=[CLAMP, FREE, DROP],
                    tooltip="The projector was trained on 0..1. Beyond, the paper shows that edits fail or get weaker "
                    "instead of stronger (A.9), so values are clamped unless you allow them. 'drop the strength' gives "
                    "the LoRA without any strength, as training showed it part of the time.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, conditioning: Conditioning, projector: ProjectorBundle, strength: object, mode: str
    ) -> io.NodeOutput:
        if mode == DROP:
            shown = "strength dropped: the LoRA acts alone"
            return io.NodeOutput(drop_projector_strength(conditioning, projector), ui=ui.PreviewText(shown))
        given = validate_strengths(strength, "strength")
        used = clamp_strengths(given) if mode == CLAMP else given
        shown = f"strength {', '.join(f'{s:g}' for s in used)}"
        outside = [f"{before:g}" for before, after in zip(given, used) if before != after]
        if outside:
            shown = f"WARNING: {', '.join(outside)} outside 0..1, clamped.\n{shown}"
        return io.NodeOutput(set_projector_strength(conditioning, projector, used), ui=ui.PreviewText(shown))
