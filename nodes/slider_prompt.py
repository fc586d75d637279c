"""The node people drag: a prompt with a slider beside each of its parts."""

from __future__ import annotations

from inspect import Parameter, Signature
from weakref import WeakKeyDictionary, ref

from comfy.sd import CLIP
from comfy_api.latest import io

from ..slider_core.conditioning.span_strengths import set_strengths
from ..slider_core.text.encode import T5_TRAINING_TOKENS, EncodedInstructions, encode_instructions
from .common.sockets import CATEGORY, channel_input, check_strengths, instruction_inputs, strength_input

STRENGTHS = tuple(f"strength_{k}" for k in range(1, 51))

_last_encoded: WeakKeyDictionary[CLIP, tuple[tuple[str, str, int | None], EncodedInstructions]] = WeakKeyDictionary()
"""What each CLIP encoded last, so that a moved slider does not run the text encoders again."""
_last_clip: list[ref[CLIP]] = []


class SliderPrompt(io.ComfyNode):
    """Encodes a prompt and gives each of its sub-instructions a strength, in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSliderPrompt",
            display_name="Slider Prompt",
            category=CATEGORY,
            description="A prompt with a slider for each of its sub-instructions: one per line, or [[marked]] phrases "
            "of a free prompt. Drag them, or send plain numbers over the API.",
            search_aliases=["slideredit", "live sliders", "sub-prompts", "edit strength"],
            inputs=[
                *instruction_inputs(),
                io.Boolean.Input(
                    "pad_to_512", default=True, advanced=True, tooltip="As SliderEdit's adapters were trained."
                ),
                *(
                    io.Float.Input(
                        name,
                        default=default,
                        min=-5.0,
                        max=5.0,
                        step=0.01,
                        advanced=True,
                        tooltip="Where the sliders end. More can be typed.",
                    )
                    for name, default in (("lowest", -0.5), ("highest", 2.0))
                ),
                channel_input(),
                *(strength_input(name, optional=True) for name in STRENGTHS),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output("prompt", tooltip="The prompt that was encoded."),
            ],
        )

    @classmethod
    def validate_inputs(cls, **strengths: object) -> bool | str:
        return check_strengths({name: value for name, value in strengths.items() if value is not None})

    @classmethod
    def execute(
        cls,
        clip: CLIP,
        text: str,
        mode: str,
        pad_to_512: bool,
        lowest: float,
        highest: float,
        channel: str | None = None,
        **strengths: object,
    ) -> io.NodeOutput:
        encoded = _encoded(clip, text, mode, pad_to_512)
        values = {name: strengths.get(name, 1.0) for name in STRENGTHS}
        channels = () if channel is None else (channel,)
        return io.NodeOutput(set_strengths(encoded.conditioning, values, *channels), encoded.prompt)


# ComfyUI leaves the check of those inputs to validate_inputs that its signature names, and blames them.
SliderPrompt.validate_inputs.__func__.__signature__ = Signature(  # type: ignore[attr-defined]
    [
        Parameter("cls", Parameter.POSITIONAL_OR_KEYWORD),
        *(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in STRENGTHS),
    ]
)


def last_clip() -> CLIP | None:
    """The CLIP that a Slider Prompt used last, while some node still keeps it."""
    return _last_clip[0]() if _last_clip else None


def _encoded(clip: CLIP, text: str, mode: str, pad_to_512: bool) -> EncodedInstructions:
    _last_clip[:] = [ref(clip)]
    how, known = (text, mode, T5_TRAINING_TOKENS if pad_to_512 else None), _last_encoded.get(clip)
    if known is None or known[0] != how:
        known = _last_encoded[clip] = how, encode_instructions(clip, *how)
    return known[1]
