"""Nodes that encode sub-instructions, select phrases and set their strengths."""

from __future__ import annotations

from comfy.sd import CLIP
from comfy_api.latest import io, ui

from ..slider_core.conditioning.span_strengths import set_strengths
from ..slider_core.text.encode import T5_TRAINING_TOKENS, encode_instructions, select_phrase
from ..slider_core.types import Conditioning
from .common.sockets import CATEGORY, channel_input, check_strengths, instruction_inputs, strength_input

STRENGTHS = tuple(f"strength_{k}" for k in range(1, 9))


class EncodeSubInstructions(io.ComfyNode):
    """Encodes a prompt and remembers which tokens belong to which sub-instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersEncodeSubInstructions",
            display_name="Encode Sub-Instructions",
            category=CATEGORY,
            description="One sub-instruction per line, joined with ' and '; each gets a slider in Sub-Instruction "
            "Strengths. Or a free prompt in which [[double brackets]] mark the phrases.",
            search_aliases=["slideredit prompt", "sub-prompts", "text encode sliders"],
            inputs=[
                *instruction_inputs(),
                io.Boolean.Input(
                    "pad_to_512",
                    default=True,
                    tooltip="SliderEdit's adapters were trained with T5 padded to 512 tokens; ComfyUI pads to 256, and "
                    "FLUX sees the padding. Keep on for them; switch off to get exactly what CLIP Text Encode gives. "
                    "Prompts that share a batch need the same length.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output("prompt", tooltip="The prompt that was encoded."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, clip: CLIP, text: str, mode: str, pad_to_512: bool) -> io.NodeOutput:
        encoded = encode_instructions(clip, text, mode, T5_TRAINING_TOKENS if pad_to_512 else None)
        shown = "\n".join(f"{k}  {span.text}  [{len(span.tokens)} tokens]" for k, span in enumerate(encoded.spans, 1))
        return io.NodeOutput(encoded.conditioning, encoded.prompt, ui=ui.PreviewText(shown))


class SubInstructionStrengths(io.ComfyNode):
    """Gives every sub-instruction of a conditioning its strength."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSubInstructionStrengths",
            display_name="Sub-Instruction Strengths",
            category=CATEGORY,
            description="strength_1 belongs to the first sub-instruction, and so on. With every strength at 1 the "
            "picture is exactly what the model gives without sliders. The last node of this kind in a row decides.",
            search_aliases=["slideredit sliders", "edit strength", "sub-prompt weights"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="From Encode Sub-Instructions or Select Phrase."),
                *(strength_input(name, optional=True) for name in STRENGTHS),
                channel_input(),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(
        cls,
        strength_1: object = None,
        strength_2: object = None,
        strength_3: object = None,
        strength_4: object = None,
        strength_5: object = None,
        strength_6: object = None,
        strength_7: object = None,
        strength_8: object = None,
    ) -> bool | str:
        # named one by one: ComfyUI blames every input that this takes
        return check_strengths(
            {name: value for name, value in locals().items() if name in STRENGTHS and value is not None}
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, channel: str | None = None, **strengths: object) -> io.NodeOutput:
        values = {name: strengths.get(name, 1.0) for name in STRENGTHS}
        channels = () if channel is None else (channel,)
        return io.NodeOutput(set_strengths(conditioning, values, *channels))


class SelectPhrase(io.ComfyNode):
    """Makes any phrase of any prompt a span with a slider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSelectPhrase",
            display_name="Select Phrase",
            category=CATEGORY,
            description="Adds a phrase of the prompt as the next sub-instruction of a conditioning made by any text "
            "encode node. Phrases may overlap: where they do, their suppressions multiply.",
            search_aliases=["token span", "prompt span", "slideredit phrase"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="What this CLIP made of exactly this prompt."),
                io.Clip.Input("clip", tooltip="The CLIP that encoded the prompt."),
                io.String.Input("prompt", multiline=True, tooltip="The prompt that was encoded."),
                io.String.Input("phrase", tooltip="Words of the prompt, as they stand there; weights may be left out."),
                io.Int.Input(
                    "occurrence",
                    default=1,
                    min=0,
                    max=1000,
                    tooltip="Which of several places of the phrase, counted from 1; 0 = all of them.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, conditioning: Conditioning, clip: CLIP, prompt: str, phrase: str, occurrence: int
    ) -> io.NodeOutput:
        return io.NodeOutput(select_phrase(conditioning, clip, prompt, phrase, occurrence))
