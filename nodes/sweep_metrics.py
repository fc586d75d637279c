"""Nodes that say how good a slider is."""

from __future__ import annotations

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from comfy_api.latest import io

from ..slider_core.errors import SliderError
from ..slider_core.figures.plots import check_matplotlib, curves_plot
from ..slider_core.metrics.clip_direction import clip_measures
from ..slider_core.metrics.image_distance import share_outside
from ..slider_core.metrics.sweep_metrics import check_sweep, measure, source_of
from ..slider_core.strength import Strengths
from .common.sockets import CATEGORY, StrengthsSocket
from .common.sweep_distances import SEEN, distance_inputs, sweep_distances


class MeasureSweep(io.ComfyNode):
    """Measures the pictures of a sweep."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersMeasureSweep",
            display_name="Measure Sweep",
            category=CATEGORY,
            description="Measures how smoothly and steadily the pictures of a sweep change, by the papers' numbers, "
            "and if you like whether they follow the words and keep what the edit is not about.",
            search_aliases=["delta smooth", "clip directional similarity", "linearity", "disentanglement", "metrics"],
            inputs=[
                io.Image.Input("images", tooltip="The sweep's pictures, one per strength."),
                StrengthsSocket.Input("strengths", tooltip="What they were rendered with, rising."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Compares the pictures: DINOv2, CLIP or SigLIP. Without it pixels are compared.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the edit may happen. Measures what changes outside of it."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Compares pictures and words. Needs clip_vision to be CLIP-L's, and both descriptions.",
                ),
                io.String.Input(
                    "source_words", default="", optional=True, tooltip="Describes the source: 'a photo of a woman'."
                ),
                io.String.Input(
                    "edit_words",
                    default="",
                    optional=True,
                    tooltip="Describes the full edit: 'a photo of an old woman'. Not an instruction.",
                ),
                *distance_inputs(),
            ],
            outputs=[
                io.String.Output("report", tooltip="To read."),
                io.String.Output("json", tooltip="Everything that was measured."),
                io.Image.Output("plot", tooltip="Distance against strength."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        strengths: Strengths,
        clip_vision: ClipVisionModel | None = None,
        mask: torch.Tensor | None = None,
        clip: CLIP | None = None,
        source_words: str = "",
        edit_words: str = "",
        distance: str = SEEN,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        check_matplotlib()
        check_sweep(strengths, len(images))
        if clip is not None and (clip_vision is None or not source_words.strip() or not edit_words.strip()):
            raise SliderError(
                "clip compares pictures and words; expected clip_vision, source_words and edit_words too. Give them "
                "all, or leave clip unlinked."
            )
        source = source_of(strengths)
        words = (
            clip_measures(images, clip_vision, clip, source_words, edit_words, source) if clip and clip_vision else None
        )
        outside = None if mask is None else share_outside(images, mask, source)
        measures = measure(strengths, sweep_distances(images, clip_vision, distance, latent, source), words, outside)
        plot = curves_plot(strengths, measures.curves(), "strength", measures.distances.compared_by)
        return io.NodeOutput(measures.report(), measures.as_json(), plot)
