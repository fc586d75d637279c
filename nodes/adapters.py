"""Nodes that load slider adapters and apply them to a model."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..slider_core import node_names as names
from ..slider_core.adapters.adapter_file import Adapter, read_adapter
from ..slider_core.adapters.gstlora import apply_gstlora
from ..slider_core.adapters.stlora import apply_stlora
from ..slider_core.conditioning.span_strengths import DEFAULT_CHANNEL
from .common import categories
from .common.files import FileStamp, lora_names, lora_path, lora_stamp
from .common.inputs import KONTEXT_MODEL, channel_input, strength_input
from .common.sockets import AdapterSocket
from .common.validation import strength_validator


class LoadAdapter(io.ComfyNode):
    """Reads an adapter file with the tensor names of SliderEdit, PEFT, ComfyUI or kohya."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersLoadAdapter",
            display_name=names.LOAD_ADAPTER,
            category=categories.ADAPTERS,
            description="Loads an STLoRA or GSTLoRA from the loras folder and shows its type, base model, rank and "
            "linears.",
            search_aliases=["slideredit", "stlora", "gstlora", "selective lora", "slider lora"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=lora_names(),
                    tooltip="A file in the loras folder: selective_lora.pt, pytorch_lora_weights.safetensors, or the "
                    "same weights with ComfyUI or kohya names.",
                )
            ],
            outputs=[
                AdapterSocket.Output(
                    "adapter", tooltip=f"For {names.APPLY_STLORA} (STLoRA) or {names.APPLY_GSTLORA} (GSTLoRA)."
                ),
                io.String.Output("info", tooltip="Type, base model, rank and linears as text."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        adapter = read_adapter(lora_path(adapter_name))
        return io.NodeOutput(adapter, adapter.describe(), ui=ui.PreviewText(adapter.describe()))

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> FileStamp:
        return lora_stamp(adapter_name)


class ApplySTLoRA(io.ComfyNode):
    """Applies a token-selective adapter, unmerged; its strengths come with the conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersApplySTLoRA",
            display_name=names.APPLY_STLORA,
            category=categories.ADAPTERS,
            description="Adds a strength slider per instruction to the model, with an STLoRA. The strengths come with "
            f"the conditioning ({names.SLIDER_PROMPT} or {names.INSTRUCTION_STRENGTHS}), so moving a slider does not "
            "reload the model.",
            search_aliases=["apply stlora", "slideredit", "selective token lora", "per instruction strength"],
            inputs=[
                io.Model.Input("model", tooltip=KONTEXT_MODEL),
                AdapterSocket.Input("adapter", tooltip=f"An STLoRA from {names.LOAD_ADAPTER}."),
                channel_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, adapter: Adapter, channel: str = DEFAULT_CHANNEL) -> io.NodeOutput:
        return io.NodeOutput(apply_stlora(model, adapter, channel))


class ApplyGSTLoRA(io.ComfyNode):
    """Applies a global adapter, unmerged, at one strength for the whole prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersApplyGSTLoRA",
            display_name=names.APPLY_GSTLORA,
            category=categories.ADAPTERS,
            description="Adds one strength slider for the whole prompt to the model, with a GSTLoRA. The adapter is "
            "not merged into the weights, so moving the slider does not reload anything. Put ordinary LoRA loaders "
            "before this node.",
            search_aliases=["apply gstlora", "slideredit", "global slider", "lora strength", "edit strength"],
            inputs=[
                io.Model.Input("model", tooltip=KONTEXT_MODEL),
                AdapterSocket.Input("adapter", tooltip=f"A GSTLoRA from {names.LOAD_ADAPTER}."),
                strength_input("strength"),
            ],
            outputs=[io.Model.Output()],
        )

    validate_inputs = strength_validator("strength")

    @classmethod
    def execute(cls, model: ModelPatcher, adapter: Adapter, strength: object) -> io.NodeOutput:
        return io.NodeOutput(apply_gstlora(model, adapter, strength))


NODES: list[type[io.ComfyNode]] = [LoadAdapter, ApplySTLoRA, ApplyGSTLoRA]
