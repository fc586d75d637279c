"""Lists of non-negative integers and ranges, such as '0, 1, 17-18'."""

from __future__ import annotations

import re

from .errors import SliderError


def parse_int_ranges(text: str, noun: str, example: str) -> list[int]:
    """Parse integers and inclusive ranges separated by commas or whitespace; an empty list for empty text.

    noun: what an integer stands for ('layer'), and example: a valid text; both are used in messages.
    Raises SliderError for an item that is neither an integer nor a range, and for a descending range.
    """
    numbers: list[int] = []
    for item in re.sub(r"\s*-\s*", "-", text).replace(",", " ").split():
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", item)
        if match is None:
            raise SliderError(f"{item!r} is not a valid {noun}; expected numbers and ranges such as {example!r}.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SliderError(f"The range {item!r} is descending; write the lower {noun} first: '{last}-{first}'.")
        numbers += range(first, last + 1)
    return numbers
