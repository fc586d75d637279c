"""The node that measures the quality of a slider."""

from __future__ import annotations

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.errors import SliderError
from ..slider_core.figures.plots import check_matplotlib, curves_plot
from ..slider_core.metrics.clip_direction import clip_scores
from ..slider_core.metrics.image_distance import fraction_outside_mask
from ..slider_core.metrics.sweep_metrics import check_sweep, measure_sweep, source_index_of
from ..slider_core.strength import Strengths
from .common import categories
from .common.inputs import clip_vision_input, distance_inputs
from .common.sockets import StrengthsSocket
from .common.sweep_distances import VISION_OR_PIXELS, sweep_distances


class MeasureSweep(io.ComfyNode):
    """Measures the images of a sweep with the metrics of the papers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersMeasureSweep",
            display_name=names.MEASURE_SWEEP,
            category=categories.SWEEP,
            description="Measures how smoothly and evenly the images of a sweep change, with the metrics of the "
            "papers, and optionally whether they follow the prompt and preserve what is not edited.",
            search_aliases=["delta smooth", "clip directional similarity", "linearity", "disentanglement", "metrics"],
            inputs=[
                io.Image.Input("images", tooltip="The sweep's images, one per strength."),
                StrengthsSocket.Input(
                    "strengths", tooltip="The strengths that the images were rendered with, in ascending order."
                ),
                clip_vision_input(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the image may change. Measures how much of the change lies outside.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Compares images with prompts. Needs the CLIP-L vision model as clip_vision, and both "
                    "source_prompt and edit_prompt.",
                ),
                io.String.Input(
                    "source_words",
                    display_name="source_prompt",
                    default="",
                    optional=True,
                    tooltip="Describes the source, for example 'a photo of a woman'.",
                ),
                io.String.Input(
                    "edit_words",
                    display_name="edit_prompt",
                    default="",
                    optional=True,
                    tooltip="Describes the full edit, for example 'a photo of an old woman'. Not an instruction.",
                ),
                *distance_inputs(),
            ],
            outputs=[
                io.String.Output("report", tooltip="Readable report."),
                io.String.Output("json", tooltip="All measured values as JSON."),
                io.Image.Output("plot", tooltip="Distance by strength."),
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
        distance: str = VISION_OR_PIXELS,
        latent: dict | None = None,
    ) -> io.NodeOutput:
        check_matplotlib()
        check_sweep(strengths, len(images))
        if clip is not None and (clip_vision is None or not source_words.strip() or not edit_words.strip()):
            raise SliderError(
                "clip compares images with prompts; expected clip_vision, source_prompt and edit_prompt too. Set all "
                "of them, or unlink clip."
            )
        source_index = source_index_of(strengths)
        scores = (
            clip_scores(images, clip_vision, clip, source_words, edit_words, source_index)
            if clip and clip_vision
            else None
        )
        outside = None if mask is None else fraction_outside_mask(images, mask, source_index)
        distances = sweep_distances(images, clip_vision, distance, latent, source_index)
        metrics = measure_sweep(strengths, distances, scores, outside)
        plot = curves_plot(strengths, metrics.curves(), "strength", metrics.distances.metric_name)
        return io.NodeOutput(metrics.report(), metrics.as_json(), plot)


NODES: list[type[io.ComfyNode]] = [MeasureSweep]
