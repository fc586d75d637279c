"""The pack's main node: a prompt with a strength slider for each of its instructions."""

from __future__ import annotations

from weakref import ref

from comfy.sd import CLIP
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.conditioning.span_strengths import DEFAULT_CHANNEL, set_strengths
from ..slider_core.text.encode import T5_TRAINING_TOKENS, encode_instructions
from .common import categories
from .common.clip_cache import cache_last_result
from .common.inputs import channel_input, fill_strengths, instruction_inputs, strength_input
from .common.validation import strength_validator

STRENGTH_INPUTS = tuple(f"strength_{k}" for k in range(1, 51))
"""Fifty, since the page hides these widgets and shows one slider per instruction instead."""

_encode = cache_last_result(encode_instructions)
_last_clip: list[ref[CLIP]] = []


class SliderPrompt(io.ComfyNode):
    """Encodes a prompt and sets the strength of each of its instructions, in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSliderPrompt",
            display_name=names.SLIDER_PROMPT,
            category=categories.PROMPT,
            description="A prompt with a strength slider for each of its instructions: one per line, or the [[marked]] "
            "phrases of a free prompt. Drag the sliders, or set the strengths as numbers over the API. Needs "
            f"{names.APPLY_STLORA} or {names.APPLY_TRAINING_FREE} on the model.",
            search_aliases=[
                "strength",
                "edit strength",
                "edit slider",
                "kontext slider",
                "kontext strength",
                "lora strength",
                "live",
                "live sliders",
                "intensity",
                "how strong",
                "slider",
                "slideredit",
                "sub-prompts",
            ],
            inputs=[
                *instruction_inputs(pad_advanced=True),
                *(
                    io.Float.Input(
                        name,
                        display_name=display_name,
                        default=default,
                        min=-5.0,
                        max=5.0,
                        step=0.01,
                        advanced=True,
                        tooltip=f"{end} end of the sliders. Values beyond it can be typed.",
                    )
                    for name, display_name, default, end in (
                        ("lowest", "slider_minimum", -0.5, "Lower"),
                        ("highest", "slider_maximum", 2.0, "Upper"),
                    )
                ),
                channel_input(),
                *(strength_input(name, optional=True) for name in STRENGTH_INPUTS),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output("prompt", tooltip="The prompt that was encoded."),
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
        lowest: float,
        highest: float,
        channel: str = DEFAULT_CHANNEL,
        **strengths: object,
    ) -> io.NodeOutput:
        _last_clip[:] = [ref(clip)]
        encoded = _encode(clip, text, mode, T5_TRAINING_TOKENS if pad_to_512 else None)
        conditioning = set_strengths(encoded.conditioning, fill_strengths(STRENGTH_INPUTS, strengths), channel)
        return io.NodeOutput(conditioning, encoded.prompt)


def last_clip() -> CLIP | None:
    """The CLIP that an Edit Strength Sliders node used last, as long as a node still holds it."""
    return _last_clip[0]() if _last_clip else None


NODES: list[type[io.ComfyNode]] = [SliderPrompt]
