"""Encoded prompts, kept while only sliders move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from comfy.sd import CLIP

Result = TypeVar("Result")


def cache_last_result(encode: Callable[..., Result]) -> Callable[..., Result]:
    """`encode(clip, *arguments)`, which keeps its last result for each CLIP.

    A node that runs again with other strengths but the same text then does not run the text encoders again.
    """
    last: WeakKeyDictionary[CLIP, tuple[tuple[Any, ...], Result]] = WeakKeyDictionary()

    def cached(clip: CLIP, *arguments: Any) -> Result:
        entry = last.get(clip)
        if entry is None or entry[0] != arguments:
            entry = last[clip] = arguments, encode(clip, *arguments)
        return entry[1]

    return cached
