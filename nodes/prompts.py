"""Nodes that encode instructions, select phrases and set their strengths."""

from __future__ import annotations

from comfy.sd import CLIP
from comfy_api.latest import io, ui

from ..slider_core import node_names as names
from ..slider_core.conditioning.span_strengths import DEFAULT_CHANNEL, set_strengths
from ..slider_core.text.encode import T5_TRAINING_TOKENS, encode_instructions, select_phrase
from ..slider_core.types import Conditioning
from .common import categories
from .common.inputs import channel_input, fill_strengths, instruction_inputs, strength_input
from .common.validation import strength_validator

STRENGTH_INPUTS = tuple(f"strength_{k}" for k in range(1, 9))
"""Only eight, since the node shows all of these widgets."""


class EncodeInstructions(io.ComfyNode):
    """Encodes a prompt and marks which tokens belong to which instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersEncodeSubInstructions",
            display_name=names.ENCODE_INSTRUCTIONS,
            category=categories.PROMPT,
            description="Encodes one instruction per line, joined with ' and ', or a free prompt in which [[double "
            f"brackets]] mark phrases. Each instruction or phrase gets a slider in {names.INSTRUCTION_STRENGTHS}.",
            search_aliases=["encode sub-instructions", "slideredit prompt", "sub-prompts", "text encode sliders"],
            inputs=[*instruction_inputs()],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output("prompt", tooltip="The prompt that was encoded."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, clip: CLIP, text: str, mode: str, pad_to_512: bool) -> io.NodeOutput:
        encoded = encode_instructions(clip, text, mode, T5_TRAINING_TOKENS if pad_to_512 else None)
        lines = [f"{k}  {span.text}  [{len(span.tokens)} tokens]" for k, span in enumerate(encoded.spans, 1)]
        return io.NodeOutput(encoded.conditioning, encoded.prompt, ui=ui.PreviewText("\n".join(lines)))


class InstructionStrengths(io.ComfyNode):
    """Sets the strength of each instruction of a conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSubInstructionStrengths",
            display_name=names.INSTRUCTION_STRENGTHS,
            category=categories.PROMPT,
            description="strength_1 belongs to the first instruction, strength_2 to the second, and so on. With all "
            "strengths at 1 the image is exactly the model's own. If several of these nodes are chained, the last one "
            "applies.",
            search_aliases=["sub-instruction strengths", "slideredit sliders", "edit strength", "sub-prompt weights"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip=f"From {names.ENCODE_INSTRUCTIONS} or {names.SELECT_PHRASE}."
                ),
                *(strength_input(name, optional=True) for name in STRENGTH_INPUTS),
                channel_input(),
            ],
            outputs=[io.Conditioning.Output()],
        )

    validate_inputs = strength_validator(*STRENGTH_INPUTS)

    @classmethod
    def execute(cls, conditioning: Conditioning, channel: str = DEFAULT_CHANNEL, **strengths: object) -> io.NodeOutput:
        return io.NodeOutput(set_strengths(conditioning, fill_strengths(STRENGTH_INPUTS, strengths), channel))


class SelectPhrase(io.ComfyNode):
    """Adds a slider for a phrase of an encoded prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSelectPhrase",
            display_name=names.SELECT_PHRASE,
            category=categories.PROMPT,
            description="Adds a phrase of the prompt as the next instruction of a conditioning from any text encode "
            "node. Phrases may overlap; where they do, their effects multiply.",
            search_aliases=["token span", "prompt span", "slideredit phrase"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The conditioning encoded from exactly this prompt."),
                io.Clip.Input("clip", tooltip="The CLIP that encoded the prompt."),
                io.String.Input("prompt", multiline=True, tooltip="The prompt that was encoded."),
                io.String.Input(
                    "phrase", tooltip="Text from the prompt, exactly as it appears there; weights may be left out."
                ),
                io.Int.Input(
                    "occurrence",
                    default=1,
                    min=0,
                    max=1000,
                    tooltip="Which occurrence of the phrase to use, counted from 1; 0 = all of them.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, conditioning: Conditioning, clip: CLIP, prompt: str, phrase: str, occurrence: int
    ) -> io.NodeOutput:
        return io.NodeOutput(select_phrase(conditioning, clip, prompt, phrase, occurrence))


NODES: list[type[io.ComfyNode]] = [EncodeInstructions, InstructionStrengths, SelectPhrase]
