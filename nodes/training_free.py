"""Nodes that need no adapter."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..slider_core.attention_weights import apply_attention_weights
from ..slider_core.text_modulation import apply_text_modulation
from ..slider_core.token_interpolation import apply_token_interpolation
from .types import CATEGORY, channel_input

METHODS = {
    "text modulation": apply_text_modulation,
    "attention to text": apply_attention_weights,
    "token interpolation": apply_token_interpolation,
}


class ApplyTrainingFree(io.ComfyNode):
    """Lets a model obey a strength per sub-instruction without an adapter, uncalibrated."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersApplyTrainingFree",
            display_name="Apply Training-Free Sliders",
            category=CATEGORY,
            description="Obeys Sub-Instruction Strengths without an adapter. Uncalibrated: strengths between 0 and 1 "
            "move the edit, but not in proportion, and may jump. Use an adapter when you have one.",
            search_aliases=["prompt to prompt", "attention reweighting", "modulation scaling", "pad tokens"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 Kontext or a relative."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    tooltip="text modulation: scales how the words are modulated; as fast as without. attention to "
                    "text: scales how much the picture looks at the words; slower, takes memory, and not with "
                    "torch.compile. token interpolation: replaces the words by padding little by little, where "
                    "attention reads them; as fast as without.",
                ),
                channel_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, method: str, **channel: str) -> io.NodeOutput:
        return io.NodeOutput(METHODS[method](model, **channel))
