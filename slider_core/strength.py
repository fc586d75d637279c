"""Strength, the unit of every slider: 0 = source, 1 = full edit, above 1 = exaggerated, below 0 = reversed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .errors import SliderError

MAX_STRENGTH = 100
"""Largest absolute value that is accepted; anything beyond is taken for a typing error."""

Strengths = tuple[float, ...]
"""The strengths of one slider: a single value for the whole batch, or one value per image of the batch."""


def validate_strengths(value: object, name: str) -> Strengths:
    """Convert a number, or a list, tuple or 1-d tensor of numbers, from a widget or a link to Strengths.

    Raises SliderError mentioning `name` if `value` is empty, not numeric, nested or exceeds MAX_STRENGTH.
    """
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    values: list = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise SliderError(f"{name} is an empty list; expected a number, or one number per image of the batch.")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise SliderError(f"{name} is {item!r}; expected a number such as 0.5, or a list of numbers.")
        if not -MAX_STRENGTH <= item <= MAX_STRENGTH:
            shown = str(item) if isinstance(item, float) else "an integer out of range"
            raise SliderError(
                f"{name} is {shown}; expected a number from {-MAX_STRENGTH} to {MAX_STRENGTH}, such as 0.5."
            )
    return tuple(float(item) for item in values)


def batch_size(strengths: Mapping[str, Strengths]) -> int:
    """Number of images that the lists among `strengths` (slider name -> strengths) are for; 1 if there are no lists.

    Raises SliderError if two lists differ in length.
    """
    lengths = {name: len(values) for name, values in strengths.items() if len(values) > 1}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise SliderError(
            f"The lists of strengths differ in length: {listed}. Expected lists of equal length, one value per image "
            "of the batch."
        )
    return next(iter(lengths.values()), 1)


def clamp_strengths(strengths: Strengths) -> Strengths:
    """Clamp each strength to 0..1."""
    return tuple(min(max(value, 0.0), 1.0) for value in strengths)


def suppression(strengths: Strengths, images: int) -> torch.Tensor:
    """SliderEdit's slider_alpha = 1 - strength, float32 of shape (images,): 1 suppresses an edit, 0 leaves it alone.

    Source: SliderEdit, arXiv 2511.09715.
    """
    return (1.0 - torch.tensor(strengths, dtype=torch.float64)).to(torch.float32).expand(images)
