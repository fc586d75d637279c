"""Where in the image, and in which sampling steps, a method acts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .schedule import check_schedule_range


@dataclass(frozen=True, eq=False)
class ActiveRegion:
    """A mask and a schedule range; by default the entire image and all sampling steps.

    mask: (height, width) or (masks, height, width), 0 to 1, multiplies the method's strength; None: 1 everywhere.
    start, end: schedule range, as fractions of the sampling steps (0 to 1), both ends included.
    Raises SliderError unless 0 <= start < end <= 1.
    """

    mask: torch.Tensor | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_schedule_range(self.start, self.end)


EVERYWHERE = ActiveRegion()
