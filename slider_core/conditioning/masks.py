"""Masks that say where sliders act."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from comfy.utils import common_upscale
from torch.nn.functional import avg_pool2d

from ..errors import SliderError


def validate_mask(mask: torch.Tensor) -> torch.Tensor:
    """The mask as (masks, height, width), float32. Raises SliderError unless it is one, with values from 0 to 1."""
    if mask.ndim not in (2, 3) or not mask.numel():
        raise SliderError(f"The mask has the shape {tuple(mask.shape)}; expected (height, width) or a batch of these.")
    mask = mask.float()
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise SliderError(
            f"The mask has values from {mask.min():.3g} to {mask.max():.3g}; expected 0 (elsewhere) to 1 (here)."
        )
    return mask if mask.ndim == 3 else mask[None]


def validate_single_mask(mask: torch.Tensor) -> torch.Tensor:
    """As validate_mask, (1, height, width). Raises SliderError for several masks too."""
    checked = validate_mask(mask)
    if len(checked) > 1:
        raise SliderError(f"There are {len(checked)} masks; expected one for all pictures. Choose one of the batch.")
    return checked


def mask_coverage(mask: torch.Tensor, latent: Sequence[int], grid: tuple[int, int]) -> torch.Tensor:
    """Which share of every image token lies in a mask (1, height, width): (tokens, 1), row by row of the grid.

    A token may reach beyond a latent's right or lower edge; what lies there does not count.
    """
    height, width = latent[-2:]
    patch = math.ceil(height / grid[0]), math.ceil(width / grid[1])
    places = common_upscale(mask[None], width, height, "area", "disabled")
    return avg_pool2d(places, patch, ceil_mode=True).reshape(-1, 1)
