"""Nodes that make equal moves of a slider change pictures equally much."""

from __future__ import annotations

import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io

from ..slider_core.figures.plots import check_matplotlib, curves_plot
from ..slider_core.metrics.calibration import calibrate, parse_calibration
from ..slider_core.metrics.sweep_metrics import check_sweep, source_of
from ..slider_core.strength import Strengths, validate_strengths
from .common.sockets import CATEGORY, StrengthsSocket, check_strengths, strength_input
from .common.sweep_distances import SEEN, distance_inputs, sweep_distances


class Calibrate(io.ComfyNode):
    """Finds the curve of a slider from the pictures of a sweep."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersCalibrate",
            display_name="Calibrate Slider",
            category=CATEGORY,
            description="Finds from a sweep's pictures the curve by which equal moves of a slider change the picture "
            "equally much, and the strengths that are of use. Paste it into Calibrated Strength.",
            search_aliases=["slider calibration", "perceptually even", "useful range"],
            inputs=[
                io.Image.Input("images", tooltip="One picture per strength, best nine or more."),
                StrengthsSocket.Input(
                    "strengths", tooltip="What they were rendered with: rising, at least from 0 to 1."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Compares the pictures: DINOv2, CLIP or SigLIP. Without it pixels are compared.",
                ),
                *distance_inputs(),
            ],
            outputs=[
                io.String.Output("curve", tooltip="For Calibrated Strength: linked, or pasted once and kept."),
                io.Image.Output("plot", tooltip="How much of the edit is there, before and after."),
                io.String.Output("report", tooltip="The useful range, in words."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        strengths: Strengths,
        clip_vision: ClipVisionModel | None = None,
        distance: str = SEEN,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        check_matplotlib()
        check_sweep(strengths, len(images))
        distances = sweep_distances(images, clip_vision, distance, latent, source_of(strengths))
        found = calibrate(strengths, distances)
        plot = curves_plot(*found.before_and_after(), "strength before, position after", "share of the edit")
        return io.NodeOutput(found.calibration.as_text(), plot, found.report(distances.compared_by))


class CalibratedStrength(io.ComfyNode):
    """A slider's position as the strength that a curve gives it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersCalibratedStrength",
            display_name="Calibrated Strength",
            category=CATEGORY,
            description="Turns even positions into a method's strengths by a curve from Calibrate Slider. The curve "
            "stays in the workflow and serves other seeds too.",
            search_aliases=["slider calibration", "strength curve"],
            has_intermediate_output=True,  # so a page that was opened anew gets the curve from ComfyUI's memory
            inputs=[
                strength_input(
                    "position",
                    tooltip="0 = the edit begins, 1 = full edit, evenly between. Link a list of strengths to get one "
                    "picture per value in one run.",
                ),
                io.String.Input(
                    "curve", multiline=True, default="", tooltip="From Calibrate Slider. Empty: position is passed on."
                ),
                io.Boolean.Input("on", default=True, tooltip="Off: position is passed on as it is."),
            ],
            outputs=[
                StrengthsSocket.Output("strengths", tooltip="For any strength of the pack, one or a list."),
                io.Float.Output("strength", tooltip="The first of them, for any number."),
            ],
        )

    @classmethod
    def validate_inputs(cls, position: object = 1.0) -> bool | str:
        return position is None or check_strengths({"position": position})

    @classmethod
    def execute(cls, position: object, curve: str, on: bool) -> io.NodeOutput:
        positions, used = validate_strengths(position, "position"), parse_calibration(curve) if on else None
        strengths = used.strength(positions) if used else positions
        return io.NodeOutput(strengths, strengths[0], ui={"curve": [curve], "points": [used.drawn() if used else []]})
