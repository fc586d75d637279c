"""Strength, the pack's one user-facing unit: 0 = source, 1 = full edit, above 1 exaggerated, below 0 reversed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .errors import SliderError

MAX_STRENGTH = 100
"""Beyond it, up or down, a strength is taken for a mistake."""

Strengths = tuple[float, ...]
"""One value for the whole batch, or one value per image."""


def validate_strengths(value: object, name: str) -> Strengths:
    """Validate a number, or a list, tuple or 1-d tensor of numbers, as it comes from a widget or a link.

    Raises SliderError naming `name` when it is empty, not numeric, not within MAX_STRENGTH or not one-dimensional.
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
            shown = str(item) if isinstance(item, float) else "a number of many digits"
            raise SliderError(
                f"{name} is {shown}; expected a number from {-MAX_STRENGTH} to {MAX_STRENGTH}, such as 0.5."
            )
    return tuple(float(item) for item in values)


def batch_size(strengths: Mapping[str, Strengths]) -> int:
    """Number of images that lists of strengths ask for; 1 when all of them are single numbers.

    Raises SliderError when two lists disagree.
    """
    lists = {name: len(values) for name, values in strengths.items() if len(values) > 1}
    if len(set(lists.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in lists.items())
        raise SliderError(f"Lists of strengths must be equally long, one value per image of the batch; {found}.")
    return next(iter(lists.values()), 1)


def clamp_strengths(strength: Strengths) -> Strengths:
    """The strengths, each moved into 0..1."""
    return tuple(min(max(value, 0.0), 1.0) for value in strength)


def suppression(strength: Strengths, length: int) -> torch.Tensor:
    """SliderEdit's alpha = 1 - strength as a float32 tensor of shape (length,): 1 suppresses the edit, 0 leaves it.

    Source: SliderEdit, section 'methods', slider_alpha.
    """
    return (1.0 - torch.tensor(strength, dtype=torch.float64)).to(torch.float32).expand(length)
