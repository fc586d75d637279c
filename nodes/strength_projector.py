"""Nodes for the strength projector of Kontinuous Kontext."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..slider_core import node_names as names
from ..slider_core.adapters.strength_projector import (
    ProjectorBundle,
    apply_projector,
    drop_projector_strength,
    read_projector,
    set_projector_strength,
)
from ..slider_core.strength import clamp_strengths, validate_strengths
from ..slider_core.types import Conditioning
from .common import categories
from .common.files import FileStamp, lora_names, lora_path, lora_stamp
from .common.inputs import STRENGTH_LIST_HINT, strength_input
from .common.sockets import ProjectorSocket
from .common.validation import strength_validator

NO_LORA = "none, or in the projector's file"
# Values in saved workflows; labels: editSlidersOptions in locales/en/main.json
CLAMP, UNCLAMPED, DROP = "clamp to 0..1", "allow outside 0..1", "drop the strength"


class LoadProjector(io.ComfyNode):
    """Reads a strength projector and the LoRA that was trained with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = lora_names()
        return io.Schema(
            node_id="EditSlidersLoadProjector",
            display_name=names.LOAD_PROJECTOR,
            category=categories.ADAPTERS,
            description="Loads a strength projector of Kontinuous Kontext and the LoRA that was trained with it, both "
            "from the loras folder, and shows their sizes.",
            search_aliases=["kontinuous kontext", "slider projector"],
            inputs=[
                io.Combo.Input(
                    "projector_name", options=files, tooltip="slider_projector.pth, or a .safetensors file."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *files],
                    tooltip="pytorch_lora_weights.safetensors from the same training. Without it the projector's edits "
                    "come out wrong.",
                ),
            ],
            outputs=[
                ProjectorSocket.Output(
                    "projector", tooltip=f"For {names.APPLY_PROJECTOR} and {names.PROJECTOR_STRENGTH}."
                ),
                io.String.Output("info", tooltip="Size of the projector and a description of its LoRA."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, projector_name: str, lora_name: str) -> io.NodeOutput:
        lora = None if lora_name == NO_LORA else lora_path(lora_name)
        bundle = read_projector(lora_path(projector_name), lora)
        return io.NodeOutput(bundle, bundle.describe(), ui=ui.PreviewText(bundle.describe()))

    @classmethod
    def fingerprint_inputs(cls, projector_name: str, lora_name: str) -> list[FileStamp]:
        return [lora_stamp(name) for name in (projector_name, lora_name) if name != NO_LORA]


class ApplyProjector(io.ComfyNode):
    """Applies a strength projector; its strengths come with the conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersApplyProjector",
            display_name=names.APPLY_PROJECTOR,
            category=categories.ADAPTERS,
            description="Adds one strength slider for the whole edit to the model, calibrated to the instruction. The "
            f"strength comes with the conditioning ({names.PROJECTOR_STRENGTH}); a conditioning without one is not "
            "changed.",
            search_aliases=["kontinuous kontext"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 Kontext."),
                ProjectorSocket.Input("projector", tooltip=f"From {names.LOAD_PROJECTOR}."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, projector: ProjectorBundle) -> io.NodeOutput:
        return io.NodeOutput(apply_projector(model, projector))


class ProjectorStrength(io.ComfyNode):
    """Sets the strength of a whole edit for a strength projector."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersProjectorStrength",
            display_name=names.PROJECTOR_STRENGTH,
            category=categories.ADAPTERS,
            description=f"Sets the strength of this conditioning's whole edit for {names.APPLY_PROJECTOR}, from the "
            "source (0) to the full edit (1).",
            search_aliases=["kontinuous kontext slider", "edit strength"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The encoded instruction, from any text encode node."),
                ProjectorSocket.Input("projector", tooltip="The projector that is applied to the model."),
                strength_input(
                    "strength",
                    default=0.5,
                    low=-1.0,
                    high=2.0,
                    tooltip="0 = source, 1 = full edit. 0 is the projector's own zero, which is not exactly the model "
                    f"without the projector. {STRENGTH_LIST_HINT}",
                ),
                io.Combo.Input(
                    "mode",
                    options=[CLAMP, UNCLAMPED, DROP],
                    tooltip="The projector was trained on strengths from 0 to 1. Beyond that range the paper reports "
                    "edits that fail or get weaker (A.9), so strengths are clamped unless you allow them. 'no "
                    "strength' uses the LoRA without any strength, as in a fraction of its training.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
            has_intermediate_output=True,
        )

    validate_inputs = strength_validator("strength")

    @classmethod
    def execute(
        cls, conditioning: Conditioning, projector: ProjectorBundle, strength: object, mode: str
    ) -> io.NodeOutput:
        if mode == DROP:
            report = "strength dropped: the LoRA acts alone"
            return io.NodeOutput(drop_projector_strength(conditioning, projector), ui=ui.PreviewText(report))
        requested = validate_strengths(strength, "strength")
        applied = clamp_strengths(requested) if mode == CLAMP else requested
        report = f"strength {', '.join(f'{s:g}' for s in applied)}"
        clamped = [f"{before:g}" for before, after in zip(requested, applied) if before != after]
        if clamped:
            report = f"WARNING: {', '.join(clamped)} outside 0..1, clamped.\n{report}"
        return io.NodeOutput(set_projector_strength(conditioning, projector, applied), ui=ui.PreviewText(report))


NODES: list[type[io.ComfyNode]] = [LoadProjector, ApplyProjector, ProjectorStrength]
