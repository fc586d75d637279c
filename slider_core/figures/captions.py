"""Captions for the images of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SliderError
from ..strength import Strengths


def sweep_captions(num_images: int, strength_lists: Sequence[Strengths], custom_captions: str = "") -> list[str]:
    """One caption per image: the lines of custom_captions, or else its strengths, those of several lists as 'a / b'.

    Raises SliderError unless the number of lines, or of strengths in each list, is the number of images.
    """
    lines = [line.strip() for line in custom_captions.strip().splitlines()]
    if lines:
        _check_count("captions", len(lines), num_images)
        return lines
    for strengths in strength_lists:
        _check_count("strengths", len(strengths), num_images)
    if not strength_lists:
        return [""] * num_images
    return [" / ".join(f"{strength:g}" for strength in row) for row in zip(*strength_lists)]


def _check_count(what: str, count: int, num_images: int) -> None:
    if count != num_images:
        raise SliderError(
            f"There are {count} {what}, but {num_images} image(s); expected one per image. Link the strengths that "
            "the images were rendered with, or give one caption per line."
        )
