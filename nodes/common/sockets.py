"""Socket types and inputs that several nodes share."""

from __future__ import annotations

from collections.abc import Mapping

from comfy_api.latest import io

from ...slider_core.conditioning.span_strengths import DEFAULT_CHANNEL
from ...slider_core.errors import SliderError
from ...slider_core.int_ranges import parse_int_ranges
from ...slider_core.strength import validate_strengths
from ...slider_core.text.encode import SPLITTERS

CATEGORY = "edit sliders"
AdapterSocket = io.Custom("SLIDER_ADAPTER")
ProjectorSocket = io.Custom("SLIDER_PROJECTOR")
StrengthsSocket = io.Custom("SLIDER_STRENGTHS")
TrajectorySocket = io.Custom("SLIDER_TRAJECTORY")
KVCacheSocket = io.Custom("SLIDER_REMEMBERED_SOURCE")

STRENGTH_TOOLTIP = (
    "0 = source, 1 = full edit, above 1 exaggerated, below 0 reversed. "
    "Link a list of strengths to get one picture per value in one run."
)


def strength_input(
    name: str,
    optional: bool = False,
    default: float = 1.0,
    low: float = -5.0,
    high: float = 5.0,
    tooltip: str = STRENGTH_TOOLTIP,
) -> io.MultiType.Input:
    """A strength slider that also takes a link from a number or from a list of strengths."""
    slider = io.Float.Input(
        name,
        default=default,
        min=low,
        max=high,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        optional=optional,
        tooltip=tooltip,
    )
    return io.MultiType.Input(slider, types=[io.Float, StrengthsSocket])


def seed_input(tooltip: str) -> io.Int.Input:
    """The seed of a noise."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
    )


def instruction_inputs() -> tuple[io.Clip.Input, io.String.Input, io.Combo.Input]:
    """clip, text and mode of what encodes sub-instructions."""
    return (
        io.Clip.Input("clip", tooltip="From DualCLIPLoader, type flux."),
        io.String.Input(
            "text",
            multiline=True,
            default="make her older\nmake her hair golden",
            tooltip="Weights (word:1.2), escapes \\( \\) and embedding:name work as everywhere.",
        ),
        io.Combo.Input(
            "mode",
            options=list(SPLITTERS),
            tooltip="one per line: every line is a sub-instruction, joined with ' and ' as in training. [[marked]] "
            "phrases: the text is used as it is, and each phrase in [[ ]] gets a slider.",
        ),
    )


def chosen_instructions_input(what: str, further: str) -> io.String.Input:
    """'sub_instructions', for parse_instruction_numbers."""
    return io.String.Input(
        "sub_instructions",
        default="",
        optional=True,
        tooltip=f"Numbers of the sub-instructions that {what}, such as 1, 3. {further}",
    )


def parse_instruction_numbers(text: str) -> list[int]:
    return parse_int_ranges(text, "sub-instruction", "1, 3-4")


def check_strengths(values: Mapping[str, object]) -> bool | str:
    """For validate_inputs: True, or what is wrong with a strength typed in or sent over the API."""
    try:
        for name, value in values.items():
            validate_strengths(value, name)
    except SliderError as error:
        return str(error)
    return True


class OneStrength:
    """A node whose input `strength` comes from strength_input."""

    @classmethod
    def validate_inputs(cls, strength: object = None) -> bool | str:
        return strength is None or check_strengths({"strength": strength})


def channel_input() -> io.String.Input:
    return io.String.Input(
        "channel",
        default=DEFAULT_CHANNEL,
        optional=True,
        advanced=True,
        tooltip="Strengths reach the Apply nodes of the same channel. Change it only to give two of them "
        "in one graph strengths of their own.",
    )
