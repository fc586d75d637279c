"""Distances between two images of the same size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

_SIDE = 64

Distance = Callable[[Image.Image, Image.Image], float]


def get_distance(name: Literal["lpips", "pixels"]) -> Distance:
    """'lpips' (AlexNet, as in Kontinuous Kontext; needs ComfyUI) or 'pixels'.

    Raises SliderError when the package lpips or AlexNet's weights are missing.
    """
    if name == "pixels":
        return pixel_distance
    from slider_core.metrics.perceptual_distance import LpipsDistance

    return LpipsDistance()


def pixel_distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean square difference of the pixels, 0 to 1, of the images resized to 64 x 64."""
    small = [np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64) for image in (one, other)]
    return float(np.sqrt(np.mean((small[0] - small[1]) ** 2)) / 255)
