"""Distances between two images of the same size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..errors import TrainingError
from ..examples import pil_to_tensor

_SIDE = 64

Distance = Callable[[Image.Image, Image.Image], float]


def get_distance(name: Literal["lpips", "pixels"]) -> Distance:
    """'lpips' (AlexNet, as in Kontinuous Kontext) or 'pixels'. Raises TrainingError when a package is missing."""
    return pixel_distance if name == "pixels" else _lpips()


def pixel_distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean square difference of the pixels, 0 to 1, of the images resized to 64 x 64."""
    small = [np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64) for image in (one, other)]
    return float(np.sqrt(np.mean((small[0] - small[1]) ** 2)) / 255)


def _lpips() -> Distance:
    try:
        import lpips
    except ImportError as error:
        raise TrainingError(
            "distance: lpips needs the package 'lpips', which is not installed: pip install lpips. Or set distance: "
            "pixels, for which the category thresholds are not made."
        ) from error
    try:
        network: Any = lpips.LPIPS(net="alex", verbose=False).eval()
    except OSError as error:
        raise TrainingError(
            f"The package lpips could not load its AlexNet ({error}). It fetches it once from PyTorch's site; without "
            "that, put its weights into the folder checkpoints in torch.hub.get_dir(), or set distance: pixels."
        ) from error

    def distance(one: Image.Image, other: Image.Image) -> float:
        pixels = [pil_to_tensor([image]).movedim(-1, 1) * 2 - 1 for image in (one, other)]
        with torch.inference_mode():
            return network(*pixels).item()

    return distance
