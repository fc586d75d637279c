"""Lists of whole numbers as people type them."""

from __future__ import annotations

import re

from .errors import SliderError


def parse_int_ranges(text: str, what: str, example: str) -> list[int]:
    """Numbers and ranges such as '0, 1, 17-18'; none for empty text.

    Raises SliderError naming what is neither, and that `what` was expected, such as `example`.
    """
    numbers: list[int] = []
    for item in re.sub(r"\s*-\s*", "-", text).replace(",", " ").split():
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", item)
        if match is None:
            raise SliderError(f"{item!r} is no {what}; expected numbers and ranges such as {example!r}.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SliderError(f"{item!r} runs backwards; expected the lower {what} first, such as '{last}-{first}'.")
        numbers += range(first, last + 1)
    return numbers
