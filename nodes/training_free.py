"""Nodes that need no adapter."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..slider_core.strength import validate_strengths
from ..slider_core.text.encode import T5_TRAINING_TOKENS
from ..slider_core.training_free.attention_reweighting import apply_attention_reweighting
from ..slider_core.training_free.prompt_difference import PromptDifferences, encode_differences
from ..slider_core.training_free.text_modulation import apply_text_modulation
from ..slider_core.training_free.token_interpolation import apply_token_interpolation
from ..slider_core.training_free.velocity_blending import blend_velocity
from .common.layer_inputs import part_inputs
from .common.sockets import (
    CATEGORY,
    OneStrength,
    channel_input,
    chosen_instructions_input,
    instruction_inputs,
    parse_instruction_numbers,
    strength_input,
)
from .prompts import STRENGTHS, SubInstructionStrengths

METHODS = {
    "text modulation": apply_text_modulation,
    "attention to text": apply_attention_reweighting,
    "token interpolation": apply_token_interpolation,
}

_last_encoded: WeakKeyDictionary[CLIP, tuple[tuple[str, str, int | None], PromptDifferences]] = WeakKeyDictionary()
"""What each CLIP encoded last, so that a moved slider does not run the text encoders again."""


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


class VelocityBlending(OneStrength, io.ComfyNode):
    """One strength for the whole edit, between the source and what the model makes of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersVelocityBlending",
            display_name="Velocity Blending",
            category=CATEGORY,
            description="One strength for the whole edit, without an adapter and at no cost: at every step the picture "
            "that the model aims at is blended with the source (VeloEdit).",
            search_aliases=["veloedit", "edit strength", "preserve source"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 Kontext or another model that gets the source as a reference."),
                io.Latent.Input("latent", tooltip="The source, in the size in which is sampled."),
                strength_input("strength"),
                io.Float.Input(
                    "keep_below",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Places where the model differs less than this from the source stay the source. Latents "
                    "spread by about 1, so 0.1 is little. 0 = off.",
                ),
                *part_inputs(),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the edit may be. Outside, the strength is 0: the source."
                ),
            ],
            outputs=[io.Model.Output()],
        )

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
        values = validate_strengths(strength, "strength")
        return io.NodeOutput(blend_velocity(model, latent["samples"], values, keep_below, start, end, mask))


class PromptDifference(io.ComfyNode):
    """Gives every sub-instruction its strength by prompts that lack it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersPromptDifference",
            display_name="Prompt Difference",
            category=CATEGORY,
            description="A strength per sub-instruction, without an adapter or a change to the model: moves along the "
            "difference that the sub-instruction makes. Every one whose strength is not 1 costs one more evaluation of "
            "the model per step.",
            search_aliases=["composable diffusion", "guidance per instruction", "sub-prompt weights"],
            inputs=[
                *instruction_inputs(),
                io.Boolean.Input(
                    "pad_to_512",
                    default=True,
                    tooltip="Pads the T5 text to 512 tokens, as Encode Sub-Instructions does.",
                ),
                *(strength_input(name, optional=True) for name in STRENGTHS),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the sub-instructions act. Outside, their strengths are 0. Every one with a "
                    "mask costs an evaluation.",
                ),
                *part_inputs(optional=True),
                chosen_instructions_input(
                    "mask, start and end are for", "The others act everywhere, at all times. Empty: for all."
                ),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output("prompt", tooltip="The prompt with all sub-instructions."),
            ],
        )

    validate_inputs = SubInstructionStrengths.validate_inputs

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
        differences = _encoded(clip, text, mode, T5_TRAINING_TOKENS if pad_to_512 else None)
        values = {name: strengths.get(name, 1.0) for name in STRENGTHS}
        chosen = parse_instruction_numbers(sub_instructions)
        return io.NodeOutput(differences.with_strengths(values, mask, start, end, chosen), differences.prompt)


def _encoded(clip: CLIP, *how: Any) -> PromptDifferences:
    known = _last_encoded.get(clip)
    if known is None or known[0] != how:
        known = _last_encoded[clip] = how, encode_differences(clip, *how)
    return known[1]
