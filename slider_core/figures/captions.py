"""What stands under the pictures of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SliderError
from ..strength import Strengths


def captions_of(images: int, lists: Sequence[Strengths], typed: str = "") -> list[str]:
    """A caption per picture: the lines of `typed`, else its strengths, those of several lists divided by a slash.

    Raises SliderError unless there are as many lines, or strengths in each list, as pictures.
    """
    lines = [line.strip() for line in typed.strip().splitlines()]
    if lines:
        _check("captions", len(lines), images)
        return lines
    for strengths in lists:
        _check("strengths", len(strengths), images)
    return [" / ".join(f"{strength:g}" for strength in each) for each in zip(*lists)] if lists else [""] * images


def _check(what: str, found: int, images: int) -> None:
    if found != images:
        raise SliderError(
            f"There are {found} {what}, but {images} image(s); expected one for each. Link what the pictures were "
            "rendered with."
        )
