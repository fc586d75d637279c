"""Nodes that need no adapter."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.conditioning.active_region import ActiveRegion
from ..slider_core.conditioning.span_strengths import DEFAULT_CHANNEL
from ..slider_core.strength import validate_strengths
from ..slider_core.text.encode import T5_TRAINING_TOKENS
from ..slider_core.training_free.attention_reweighting import apply_attention_reweighting
from ..slider_core.training_free.prompt_difference import encode_differences
from ..slider_core.training_free.text_modulation import apply_text_modulation
from ..slider_core.training_free.token_interpolation import apply_token_interpolation
from ..slider_core.training_free.velocity_blending import blend_velocity
from .common import categories
from .common.clip_cache import cache_last_result
from .common.inputs import (
    KONTEXT_MODEL,
    channel_input,
    end_input,
    fill_strengths,
    instruction_inputs,
    instruction_numbers_input,
    parse_instruction_numbers,
    start_input,
    strength_input,
)
from .common.validation import strength_validator
from .prompts import STRENGTH_INPUTS

METHODS = {
    "text modulation": apply_text_modulation,
    "attention to text": apply_attention_reweighting,
    "token interpolation": apply_token_interpolation,
}

_encode_differences = cache_last_result(encode_differences)


class ApplyTrainingFree(io.ComfyNode):
    """Applies a strength per instruction without an adapter, uncalibrated."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersApplyTrainingFree",
            display_name=names.APPLY_TRAINING_FREE,
            category=categories.TRAINING_FREE,
            description=f"Applies the strengths of {names.SLIDER_PROMPT} or {names.INSTRUCTION_STRENGTHS} without an "
            "adapter. Uncalibrated: strengths between 0 and 1 move the edit, but not in proportion, and it may jump. "
            "Use an adapter if you have one.",
            search_aliases=["prompt to prompt", "attention reweighting", "modulation scaling", "pad tokens"],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip=KONTEXT_MODEL),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    tooltip="'text modulation': scales the modulation of the text tokens, at no cost. 'attention to "
                    "text': scales the image's attention to the text tokens; slower, needs more memory, and does not "
                    "work with torch.compile. 'token interpolation': gradually replaces the text tokens with padding "
                    "at the input of the attention, at no cost.",
                ),
                channel_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, method: str, channel: str = DEFAULT_CHANNEL) -> io.NodeOutput:
        return io.NodeOutput(METHODS[method](model, channel))


class VelocityBlendingNode(io.ComfyNode):
    """One strength for the whole edit, which blends the model's prediction with the source."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersVelocityBlending",
            display_name=names.VELOCITY_BLENDING,
            category=categories.TRAINING_FREE,
            description="One strength for the whole edit, without an adapter and at no cost: at every step, the "
            "image that the model predicts is blended with the source (VeloEdit).",
            search_aliases=["veloedit", "edit strength", "preserve source"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="FLUX.1 Kontext, or another model that gets the source as a reference latent."
                ),
                io.Latent.Input("latent", tooltip="The source, at the same size as the sampled latent."),
                strength_input("strength"),
                io.Float.Input(
                    "keep_below",
                    display_name="difference_threshold",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Regions where the prediction differs from the source by less than this keep the source. "
                    "Latents have a standard deviation of about 1, so 0.1 is a small difference. 0 = off.",
                ),
                start_input(advanced=True),
                end_input(advanced=True),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the image may change. Outside, the strength is 0: the source."
                ),
            ],
            outputs=[io.Model.Output()],
        )

    validate_inputs = strength_validator("strength")

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        latent: dict,
        strength: object,
        keep_below: float,
        start: float,
        end: float,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        values, region = validate_strengths(strength, "strength"), ActiveRegion(mask, start, end)
        return io.NodeOutput(blend_velocity(model, latent["samples"], values, keep_below, region))


class PromptDifference(io.ComfyNode):
    """Sets the strength of each instruction by guidance away from the prompt without it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersPromptDifference",
            display_name=names.PROMPT_DIFFERENCE,
            category=categories.TRAINING_FREE,
            description="A strength per instruction, without an adapter and without patching the model: guidance along "
            "the difference between the prompt and the prompt without the instruction. Each instruction whose strength "
            "is not 1 costs one more model evaluation per step.",
            search_aliases=["composable diffusion", "guidance per instruction", "sub-prompt weights"],
            inputs=[
                *instruction_inputs(),
                *(strength_input(name, optional=True) for name in STRENGTH_INPUTS),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the instructions act. Outside, their strengths are 0. Each instruction with a mask "
                    "costs one model evaluation per step.",
                ),
                start_input(optional=True, advanced=True),
                end_input(optional=True, advanced=True),
                instruction_numbers_input(
                    "that mask, start_percent and end_percent apply to",
                    "The other instructions act everywhere and at every step. Empty: all instructions.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output("prompt", tooltip="The prompt with all instructions."),
            ],
        )

    validate_inputs = strength_validator(*STRENGTH_INPUTS)

    @classmethod
    def execute(
        cls,
        clip: CLIP,
        text: str,
        mode: str,
        pad_to_512: bool,
        mask: torch.Tensor | None = None,
        start: float = 0.0,
        end: float = 1.0,
        sub_instructions: str = "",
        **strengths: object,
    ) -> io.NodeOutput:
        differences = _encode_differences(clip, text, mode, T5_TRAINING_TOKENS if pad_to_512 else None)
        chosen = parse_instruction_numbers(sub_instructions)
        values = fill_strengths(STRENGTH_INPUTS, strengths)
        return io.NodeOutput(differences.with_strengths(values, mask, start, end, chosen), differences.prompt)


NODES: list[type[io.ComfyNode]] = [ApplyTrainingFree, VelocityBlendingNode, PromptDifference]
