"""Lists of strengths, and the latent batch that goes with them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import SliderError
from .strength import Strengths, validate_strengths


def linspace(first: float, last: float, count: int) -> Strengths:
    """`count` evenly spaced strengths from `first` to `last`, rounded to 6 decimals so that 0 and 1 are exact."""
    [start], [end] = validate_strengths(first, "first"), validate_strengths(last, "last")
    return tuple(np.linspace(start, end, count).round(6).tolist())


def parse_strengths(text: str) -> Strengths:
    """Strengths separated by commas, semicolons or white space. Raises SliderError naming what is no number."""
    values = []
    for item in text.replace(",", " ").replace(";", " ").split():
        try:
            values.append(float(item))
        except ValueError:
            raise SliderError(f"{item!r} is no number; expected strengths such as '0, 0.5, 1'.") from None
    return validate_strengths(values, "The list of strengths")


def strength_grid(down: Strengths, across: Strengths) -> tuple[Strengths, Strengths]:
    """Every combination of two lists, row by row: two lists of len(down) * len(across) strengths each."""
    return tuple(one for one in down for _ in across), across * len(down)


def repeat_latent(latent: dict[str, Any], count: int) -> dict[str, Any]:
    """Repeat one latent image (samples of shape (1, ...)) `count` times, all with the first image's noise.

    A batch that already has `count` images only gets the same noise for all. A noise mask of one image is left for
    ComfyUI to repeat. Raises SliderError for a batch of another number of images.
    """
    samples = latent["samples"]
    if samples.shape[0] not in (1, count):
        raise SliderError(
            f"The latent has {samples.shape[0]} images; expected one, which is repeated per strength, or {count}."
        )
    if samples.shape[0] == 1:
        samples = samples.repeat(count, *[1] * (samples.ndim - 1))
    return {**latent, "samples": samples, "batch_index": [latent.get("batch_index", [0])[0]] * count}
