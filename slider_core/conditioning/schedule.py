"""Ranges of the sampling schedule, start..end from 0 to 1, and conditioning entries that are active in one."""

from __future__ import annotations

from comfy.conds import CONDConstant

from .. import keys
from ..errors import SliderError
from ..types import CondEntry

_MARGIN = 1e-5
"""Added at the borders of a range. Schedules often place a sigma exactly on start or end, and ComfyUI counts both ends
of a range as inside, so such a step would fall into two ranges."""


def check_schedule_range(start: float, end: float) -> None:
    """Raise SliderError unless 0 <= start < end <= 1."""
    if not 0 <= start < end <= 1:
        raise SliderError(
            f"start is {start:g} and end is {end:g}; expected 0 <= start < end <= 1. To switch it off, bypass the node."
        )


def split_by_schedule(inside: list[CondEntry], outside: list[CondEntry], start: float, end: float) -> list[CondEntry]:
    """Entries limited to parts of the schedule: `inside` from start to end, `outside` before and after."""
    if (start, end) == (0, 1):
        return inside
    first, last = start - _MARGIN if start > 0 else 0.0, end + _MARGIN if end < 1 else 1.0
    return [*_limited_to(outside, 0.0, first), *_limited_to(inside, first, last), *_limited_to(outside, last, 1.0)]


def _limited_to(entries: list[CondEntry], start: float, end: float) -> list[CondEntry]:
    """The entries in the intersection of this range and their own, without those where it is empty."""
    limited = []
    for cond, options in entries:
        first, last = max(start, options.get("start_percent", 0.0)), min(end, options.get("end_percent", 1.0))
        if first < last:
            conds = {**options.get("model_conds", {}), keys.SCHEDULE_RANGE: CONDConstant((first, last))}
            limited.append([cond, {**options, "start_percent": first, "end_percent": last, "model_conds": conds}])
    return limited
