"""Nodes that calibrate a slider, so that equal moves change the image equally."""

from __future__ import annotations

import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.figures.plots import check_matplotlib, curves_plot
from ..slider_core.metrics.calibration import calibrate, parse_calibration
from ..slider_core.metrics.sweep_metrics import check_sweep, source_index_of
from ..slider_core.strength import Strengths, validate_strengths
from .common import categories
from .common.inputs import STRENGTH_LIST_HINT, clip_vision_input, distance_inputs, strength_input
from .common.sockets import StrengthsSocket
from .common.sweep_distances import VISION_OR_PIXELS, sweep_distances
from .common.validation import strength_validator


class CalibrateSlider(io.ComfyNode):
    """Computes a slider's calibration curve from the images of a sweep."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersCalibrate",
            display_name=names.CALIBRATE_SLIDER,
            category=categories.SWEEP,
            description="Computes, from the images of a sweep, the curve with which equal moves of a slider change the "
            f"image equally, and the useful range of strengths. Use the curve in {names.CALIBRATED_STRENGTH}.",
            search_aliases=["slider calibration", "perceptually even", "useful range"],
            inputs=[
                io.Image.Input("images", tooltip="One image per strength, preferably nine or more."),
                StrengthsSocket.Input(
                    "strengths",
                    tooltip="The strengths that the images were rendered with, in ascending order, covering at least 0 "
                    "to 1.",
                ),
                clip_vision_input(),
                *distance_inputs(),
            ],
            outputs=[
                io.String.Output(
                    "curve", tooltip=f"For {names.CALIBRATED_STRENGTH}: link it, or paste it there to keep it."
                ),
                io.Image.Output("plot", tooltip="Progress of the edit by strength, before and after calibration."),
                io.String.Output("report", tooltip="Readable report on the useful range."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        strengths: Strengths,
        clip_vision: ClipVisionModel | None = None,
        distance: str = VISION_OR_PIXELS,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        check_matplotlib()
        check_sweep(strengths, len(images))
        distances = sweep_distances(images, clip_vision, distance, latent, source_index_of(strengths))
        result = calibrate(strengths, distances)
        plot = curves_plot(*result.before_and_after(), "strength before, position after", "share of the edit")
        return io.NodeOutput(result.calibration.as_json(), plot, result.report(distances.metric_name))


class CalibratedStrength(io.ComfyNode):
    """Maps a slider position to a strength by a calibration curve."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersCalibratedStrength",
            display_name=names.CALIBRATED_STRENGTH,
            category=categories.SWEEP,
            description=f"Maps evenly spaced positions to strengths by a curve from {names.CALIBRATE_SLIDER}. The "
            "curve is saved with the workflow and also works for other seeds.",
            search_aliases=["slider calibration", "strength curve"],
            has_intermediate_output=True,  # a reloaded page then gets the curve from ComfyUI's cache
            inputs=[
                strength_input(
                    "position",
                    tooltip=f"0 = the edit begins, 1 = full edit, even steps between. {STRENGTH_LIST_HINT}",
                ),
                io.String.Input(
                    "curve",
                    multiline=True,
                    default="",
                    tooltip=f"From {names.CALIBRATE_SLIDER}. Empty: the position is used as the strength.",
                ),
                io.Boolean.Input(
                    "on", display_name="enabled", default=True, tooltip="Off: the position is used as the strength."
                ),
            ],
            outputs=[
                StrengthsSocket.Output("strengths", tooltip="For any strength input of these nodes: one or a list."),
                io.Float.Output("strength", tooltip="The first strength as a number."),
            ],
        )

    validate_inputs = strength_validator("position")

    @classmethod
    def execute(cls, position: object, curve: str, on: bool) -> io.NodeOutput:
        positions, calibration = validate_strengths(position, "position"), parse_calibration(curve) if on else None
        strengths = calibration.strengths_at(positions) if calibration else positions
        points = calibration.curve_points() if calibration else []
        return io.NodeOutput(strengths, strengths[0], ui={"curve": [curve], "points": [points]})


NODES: list[type[io.ComfyNode]] = [CalibrateSlider, CalibratedStrength]
