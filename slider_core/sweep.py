"""Strength sweeps: lists of strengths, and the latent batch with one image per strength."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import SliderError
from .strength import Strengths, validate_strengths


def linspace(first: float, last: float, count: int) -> Strengths:
    """`count` evenly spaced strengths from `first` to `last`, rounded to 6 decimals so that 0 and 1 are exact.

    Raises SliderError if `first` or `last` is not a valid strength.
    """
    [start], [end] = validate_strengths(first, "first"), validate_strengths(last, "last")
    return tuple(np.linspace(start, end, count).round(6).tolist())


def parse_strengths(text: str) -> Strengths:
    """Parse strengths separated by commas, semicolons or whitespace.

    Raises SliderError for an empty list and for items that are not numbers or exceed the limits of a strength.
    """
    values = []
    for item in text.replace(",", " ").replace(";", " ").split():
        try:
            values.append(float(item))
        except ValueError:
            raise SliderError(f"{item!r} is not a number; expected strengths such as '0, 0.5, 1'.") from None
    return validate_strengths(values, "The list of strengths")


def strength_grid(rows: Strengths, columns: Strengths) -> tuple[Strengths, Strengths]:
    """All combinations of two lists in row-major order: two lists of len(rows) * len(columns) strengths each."""
    return tuple(row for row in rows for _ in columns), columns * len(rows)


def repeat_latent(latent: dict[str, Any], count: int) -> dict[str, Any]:
    """Repeat a latent of one image (samples of shape (1, ...)) to a batch of `count`, all with the same noise.

    A batch that already has `count` images keeps them and only shares the noise of its first image (batch_index).
    A noise_mask of one image is not repeated here; ComfyUI does that.
    Raises SliderError for a batch with any other number of images.
    """
    samples = latent["samples"]
    if samples.shape[0] not in (1, count):
        raise SliderError(
            f"The latent has {samples.shape[0]} images; expected one image, which is repeated for each strength, or "
            f"{count} images."
        )
    if samples.shape[0] == 1:
        samples = samples.repeat(count, *[1] * (samples.ndim - 1))
    return {**latent, "samples": samples, "batch_index": [latent.get("batch_index", [0])[0]] * count}
