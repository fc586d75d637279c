"""Nodes that load slider adapters and put them on a model."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..slider_core.adapters.adapter_file import Adapter, read_adapter
from ..slider_core.adapters.gstlora import apply_gstlora
from ..slider_core.adapters.stlora import apply_stlora
from .common.files import fingerprint, names, path_of
from .common.sockets import CATEGORY, AdapterSocket, OneStrength, channel_input, strength_input


class LoadAdapter(io.ComfyNode):
    """Reads an adapter file and says what it is (SliderEdit files, PEFT, ComfyUI and kohya names)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersLoadAdapter",
            display_name="Load Slider Adapter",
            category=CATEGORY,
            description="Loads an STLoRA or GSTLoRA from the loras folder and shows its kind, base, rank and layers.",
            search_aliases=["slideredit", "stlora", "gstlora", "selective lora", "slider lora"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=names(),
                    tooltip="A file of the loras folder: selective_lora.pt, pytorch_lora_weights.safetensors, or the "
                    "same in ComfyUI or kohya names.",
                )
            ],
            outputs=[
                AdapterSocket.Output("adapter", tooltip="For Apply STLoRA or Apply GSTLoRA."),
                io.String.Output("info", tooltip="Kind, base model, rank and layers as text."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        adapter = read_adapter(path_of(adapter_name))
        return io.NodeOutput(adapter, adapter.describe(), ui=ui.PreviewText(adapter.describe()))

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> tuple[float, int]:
        return fingerprint(adapter_name)


class ApplySTLoRA(io.ComfyNode):
    """Puts a token-selective adapter beside the model; the strengths come with the conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersApplySTLoRA",
            display_name="Apply STLoRA",
            category=CATEGORY,
            description="Lets the model obey a strength per sub-instruction. Strengths travel with the conditioning "
            "(Sub-Instruction Strengths), so moving a slider does not touch the model.",
            search_aliases=["slideredit", "selective token lora", "per instruction strength"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 Kontext or a relative."),
                AdapterSocket.Input("adapter", tooltip="An STLoRA from Load Slider Adapter."),
                channel_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, adapter: Adapter, **channel: str) -> io.NodeOutput:
        return io.NodeOutput(apply_stlora(model, adapter, **channel))


class ApplyGSTLoRA(OneStrength, io.ComfyNode):
    """Puts a global adapter beside the model, at one strength for the whole instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersApplyGSTLoRA",
            display_name="Apply GSTLoRA",
            category=CATEGORY,
            description="One strength for the whole instruction. Runs beside the model: weights are not merged, and "
            "moving the slider does not load anything again. Put ordinary LoRA loaders above this node.",
            search_aliases=["slideredit", "global slider", "edit strength"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 Kontext or a relative."),
                AdapterSocket.Input("adapter", tooltip="A GSTLoRA from Load Slider Adapter."),
                strength_input("strength"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, adapter: Adapter, strength: object) -> io.NodeOutput:
        return io.NodeOutput(apply_gstlora(model, adapter, strength))
