"""Masks that limit where sliders act."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from comfy.utils import common_upscale
from torch.nn.functional import avg_pool2d

from ..errors import SliderError


def validate_mask(mask: torch.Tensor) -> torch.Tensor:
    """The mask as float32 (masks, height, width). Raises SliderError for other shapes and values outside 0 to 1."""
    if mask.ndim not in (2, 3) or not mask.numel():
        raise SliderError(f"The mask has the shape {tuple(mask.shape)}; expected (height, width) or a batch of these.")
    mask = mask.float()
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise SliderError(
            f"The mask has values from {mask.min():.3g} to {mask.max():.3g}; expected 0 (outside) to 1 (inside)."
        )
    return mask if mask.ndim == 3 else mask[None]


def validate_single_mask(mask: torch.Tensor) -> torch.Tensor:
    """The mask as float32 (1, height, width). Raises SliderError as validate_mask does, and for several masks."""
    checked = validate_mask(mask)
    if len(checked) > 1:
        raise SliderError(f"There are {len(checked)} masks; expected one for all images. Select one of the batch.")
    return checked


def mask_coverage(mask: torch.Tensor, latent_shape: Sequence[int], grid: tuple[int, int]) -> torch.Tensor:
    """Fraction of every image token that a mask covers: (tokens, 1), in row-major order of the token grid.

    mask: (1, height, width). latent_shape: (..., height, width). grid: (height, width) in tokens. Where a token extends
    beyond the right or lower edge of the latent, only the part inside counts.
    """
    height, width = latent_shape[-2:]
    patch = math.ceil(height / grid[0]), math.ceil(width / grid[1])
    resized = common_upscale(mask[None], width, height, "area", "disabled")
    return avg_pool2d(resized, patch, ceil_mode=True).reshape(-1, 1)
