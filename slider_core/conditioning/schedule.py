"""Parts of the denoising, start..end of the schedule from 0 to 1, and entries of a CONDITIONING that hold in one."""

from __future__ import annotations

from comfy.conds import CONDConstant

from ..errors import SliderError
from ..patching.forward_patches import TIME_RANGE
from ..types import CondEntry

_APART = 1e-5
"""By which a part reaches beyond its borders, where noise levels like to lie exactly: else they would be in two parts,
since ComfyUI counts both borders of a part to it."""


def check_schedule_range(start: float, end: float) -> None:
    """Raise SliderError unless these are the start and end of a part of the schedule."""
    if not 0 <= start < end <= 1:
        raise SliderError(
            f"start is {start:g} and end is {end:g}; expected 0 <= start < end <= 1. To switch it off, bypass the node."
        )


def split_by_schedule(inside: list[CondEntry], outside: list[CondEntry], start: float, end: float) -> list[CondEntry]:
    """Entries of which `inside` hold in start..end of the schedule with its borders, and `outside` before and after."""
    if (start, end) == (0, 1):
        return inside
    first, last = start - _APART if start > 0 else 0.0, end + _APART if end < 1 else 1.0
    return [*_within(outside, 0.0, first), *_within(inside, first, last), *_within(outside, last, 1.0)]


def _within(entries: list[CondEntry], start: float, end: float) -> list[CondEntry]:
    """The entries in this part of the schedule, as far as their own part is in it."""
    parts = []
    for cond, options in entries:
        first, last = max(start, options.get("start_percent", 0.0)), min(end, options.get("end_percent", 1.0))
        if first < last:
            conds = {**options.get("model_conds", {}), TIME_RANGE: CONDConstant((first, last))}
            parts.append([cond, {**options, "start_percent": first, "end_percent": last, "model_conds": conds}])
    return parts
