"""Inputs by which several nodes let people choose layers."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...slider_core.stable_flow.vital_layers import LAYER_SETS, layer_set, parse_block_indices

LISTED = "listed below"


def layer_inputs() -> list[io.Input]:
    """'layers' and 'list', for chosen_layers."""
    return [
        io.Combo.Input(
            "layers",
            options=[*LAYER_SETS, LISTED],
            tooltip="The paper's vital layers; the others are its ablations: all layers keep nearly everything, all "
            "but the vital ones next to nothing.",
        ),
        io.String.Input(
            "list",
            default="0, 1, 17-18",
            advanced=True,
            tooltip="For 'listed below': layers counted from 0, double blocks first (0 to 18), then single blocks "
            "(19 to 56). Find Vital Layers gives such a list.",
        ),
    ]


def chosen_layers(model: ModelPatcher, layers: str, listed: str) -> list[int]:
    return parse_block_indices(listed) if layers == LISTED else layer_set(model, layers)


def part_inputs(optional: bool = False) -> list[io.Input]:
    """'start' and 'end': a part of the schedule."""
    return [
        io.Float.Input(
            name,
            default=default,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=optional,
            advanced=True,
            tooltip="Share of the schedule.",
        )
        for name, default in (("start", 0.0), ("end", 1.0))
    ]


def injection_mask_input() -> io.Mask.Input:
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where the pictures keep the source: 1 = as preservation says, 0 = not. Without one: everywhere.",
    )


def preservation_input() -> io.Float.Input:
    return io.Float.Input(
        "preservation",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        tooltip="0 = every picture by itself, 1 = the paper's injection; between, own and injected keys and values "
        "are blended.",
    )
