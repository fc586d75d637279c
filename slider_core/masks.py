"""Masks that say where sliders act."""

from __future__ import annotations

import torch
from comfy.utils import common_upscale

from .errors import SliderError


def checked_mask(mask: torch.Tensor) -> torch.Tensor:
    """The mask as (masks, height, width), float32. Raises SliderError unless it is one, with values from 0 to 1."""
    if mask.ndim not in (2, 3) or not mask.numel():
        raise SliderError(f"The mask has the shape {tuple(mask.shape)}; expected (height, width) or a batch of these.")
    mask = mask.float()
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise SliderError(
            f"The mask has values from {mask.min():.3g} to {mask.max():.3g}; expected 0 (elsewhere) to 1 (here)."
        )
    return mask if mask.ndim == 3 else mask[None]


def is_everywhere(mask: torch.Tensor) -> bool:
    """Whether it is all ones."""
    return bool((mask == 1).all())


def checked_single_mask(mask: torch.Tensor) -> torch.Tensor:
    """As checked_mask, (1, height, width). Raises SliderError for several masks too."""
    checked = checked_mask(mask)
    if len(checked) > 1:
        raise SliderError(f"There are {len(checked)} masks; expected one for all pictures. Choose one of the batch.")
    return checked


def token_shares(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which share of every image token lies in a mask (1, height, width): (tokens, 1), row by row of the grid."""
    rows, columns = grid
    return common_upscale(mask[None], columns, rows, "area", "disabled").reshape(-1, 1)
