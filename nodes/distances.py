"""By what the pictures of a sweep are compared."""

from __future__ import annotations

import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io

from ..slider_core.perceptual_distance import lpips_distances
from ..slider_core.picture_distance import PictureDistances, feature_distances, pixel_distances

SEEN, LPIPS = "clip_vision or pixels", "LPIPS"


def distance_input() -> io.Combo.Input:
    return io.Combo.Input(
        "distance",
        options=[SEEN, LPIPS],
        default=SEEN,
        optional=True,
        tooltip="clip_vision or pixels: pixels where clip_vision is not linked. LPIPS: as people find pictures "
        "different; needs the package lpips and AlexNet's weights on this computer.",
    )


def sweep_distances(
    images: torch.Tensor, vision: ClipVisionModel | None, distance: str, source: int
) -> PictureDistances:
    """By the choice of distance_input."""
    if distance == LPIPS:
        return lpips_distances(images, source)
    return pixel_distances(images, source) if vision is None else feature_distances(images, vision, source)
