"""Calibration of a slider: a curve from positions to strengths, along which equal moves change the image equally.

Let L(s) be the cumulative path length of a sweep's images up to strength s, and s_0 the largest measured strength below
1 at which at most MIN_CHANGE of the change from strength 0 to 1 has happened. The position of a strength is

    p(s) = (L(s) - L(s_0)) / (L(1) - L(s_0))

so the edit begins at position 0 and is complete (strength 1) at position 1. The curve is the inverse of p, by monotone
cubic interpolation (PCHIP).

Sources of the idea: Kontinuous Kontext's re-mapped strengths (arXiv 2510.08532, section 4), and the perceptually even
slider ranges of text-embedding steering (arXiv 2603.17998).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from statistics import median

import numpy as np
from scipy.interpolate import PchipInterpolator

from ..errors import SliderError
from ..strength import Strengths, validate_strengths
from .image_distance import ImageDistances
from .sweep_metrics import check_sweep

MIN_CHANGE = 0.02
"""Fraction of the change from strength 0 to 1: a range that changes less is not worth a slider move."""
JUMP_FACTOR = 4.0
"""The usable range ends where the image changes this many times faster than the median rate between 0 and 1."""
REGRESSION_FACTOR = 0.9
"""The usable range ends where the distance from the source falls below this fraction of the one at strength 1."""

_DECIMALS = 4
_NUM_CURVE_POINTS = 65
_MIN_POSITION_STEP = 0.005
_NO_MORE_IMAGES = "the sweep ends there"
_EXAMPLE = '{"positions": [0, 0.5, 1], "strengths": [0.2, 0.7, 1]}'


@dataclass(frozen=True)
class Calibration:
    """A monotone curve through at least two points; positions and strengths are ascending.

    Position 0: the edit begins. Position 1: strength 1.
    """

    positions: Strengths
    strengths: Strengths

    def strengths_at(self, positions: Sequence[float]) -> Strengths:
        """Strengths by PCHIP between the points; beyond them linear, with the mean slope from position 0 to 1.

        Raises SliderError for a strength outside the valid range.
        """
        curve, x = PchipInterpolator(self.positions, self.strengths), np.asarray(positions, np.float64)
        clipped = x.clip(self.positions[0], self.positions[-1])
        begin, full = curve([0.0, 1.0])
        strengths = curve(clipped) + (x - clipped) * (full - begin)
        return validate_strengths(strengths.round(6).tolist(), "The calibrated strength")

    def curve_points(self) -> list[tuple[float, float]]:
        """(position, strength) pairs for drawing the curve: evenly spaced ones and its own points."""
        even = np.linspace(self.positions[0], self.positions[-1], _NUM_CURVE_POINTS).tolist()
        positions = sorted({*self.positions, *even})
        return list(zip(positions, self.strengths_at(positions)))

    def as_json(self) -> str:
        """Short text that parse_calibration reads back to the same curve."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class CalibrationResult:
    """A calibration and how it came about.

    lower_limit, upper_limit: why the usable range ends there. path: (strength, position) of each measured image.
    """

    calibration: Calibration
    lower_limit: str
    upper_limit: str
    path: tuple[tuple[float, float], ...]

    def report(self, metric_name: str) -> str:
        """Readable text."""
        curve = self.calibration
        [begin] = curve.strengths_at([0.0])
        return "\n".join(
            [
                f"Calibrated with {len(self.path)} images, compared by {metric_name}.",
                f"Position 0 is strength {begin:g}: below it, less than {MIN_CHANGE:.0%} of the edit happens.",
                "Position 1 is strength 1.",
                f"Usable from position {curve.positions[0]:g} (strength {curve.strengths[0]:g}; {self.lower_limit}) to "
                f"{curve.positions[-1]:g} (strength {curve.strengths[-1]:g}; {self.upper_limit}).",
            ]
        )

    def before_and_after(self) -> tuple[list[float], dict[str, list[float]]]:
        """x from 0 to 1, and label -> fraction of the edit at strength x (before) and at position x (after)."""
        x = np.linspace(0, 1, 21).tolist()
        strengths, positions = zip(*self.path)
        before, after = (
            np.interp(values, strengths, positions).tolist() for values in (x, self.calibration.strengths_at(x))
        )
        return x, {"even": x, "before, by strength": before, "after, by position": after}


def calibrate(strengths: Sequence[float], distances: ImageDistances) -> CalibrationResult:
    """The calibration of a sweep.

    The curve covers the sweep, except where the image stops changing, jumps, or returns toward the source.
    Non-monotone distances from the source are fine: the path length is their cumulative sum over neighbors.
    Raises SliderError when the strengths do not reach from 0 to 1, or nothing changes between them.
    """
    check_sweep(strengths, len(distances.from_source))
    if strengths[0] > 0 or strengths[-1] < 1:
        raise SliderError(
            f"The strengths go from {strengths[0]:g} to {strengths[-1]:g}; expected images from 0 (or less) to 1 (or "
            "more), ideally at least nine."
        )
    knots = sorted({*strengths, 0.0, 1.0})
    lengths = _interpolate(strengths, [0.0, *accumulate(distances.path_lengths())], knots)
    zero, one = knots.index(0.0), knots.index(1.0)
    total = lengths[one] - lengths[zero]
    if not total > 0:
        raise SliderError("Nothing changes from strength 0 to 1, so the slider cannot be calibrated.")
    begin = max(k for k in range(zero, one) if lengths[k] - lengths[zero] <= MIN_CHANGE * total)
    median_rate = median(_rate(knots, lengths, k, k + 1) for k in range(begin, one))
    low, lower_limit = _usable_end(range(zero, -1, -1), knots, lengths, median_rate, total)
    from_source = _interpolate(strengths, distances.to_lengths(distances.from_source), knots)
    regression = (k for k in range(one, len(knots)) if from_source[k] < REGRESSION_FACTOR * from_source[one])
    stop = next(regression, len(knots))
    high, upper_limit = _usable_end(range(one, stop), knots, lengths, median_rate, total)
    if high == stop - 1 < len(knots) - 1:
        upper_limit = "beyond it the image returns toward the source"
    positions = [(length - lengths[begin]) / (lengths[one] - lengths[begin]) for length in lengths]
    points = [(positions[k], knots[k]) for k in (*range(low, zero), *range(begin, high + 1))]
    path = zip(strengths, _interpolate(knots, positions, strengths))
    return CalibrationResult(_calibration_through(points), lower_limit, upper_limit, tuple(path))


def parse_calibration(text: str) -> Calibration | None:
    """Read the text of Calibration.as_json; None for empty text. Raises SliderError for anything but a valid curve."""
    if not text.strip():
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise SliderError(f"The curve is not valid JSON: {text[:60]!r}. Expected text such as {_EXAMPLE}.") from None
    if not isinstance(content, dict) or set(content) != {"positions", "strengths"}:
        raise SliderError(f"The curve must have exactly 'positions' and 'strengths', such as {_EXAMPLE}.")
    positions, strengths = (_parse_ascending(content[name], name) for name in ("positions", "strengths"))
    if len(positions) != len(strengths):
        raise SliderError(
            f"The curve has {len(positions)} positions and {len(strengths)} strengths; expected the same number."
        )
    if positions[0] > 0 or positions[-1] < 1:
        raise SliderError(
            f"The curve's positions go from {positions[0]:g} to {positions[-1]:g}; expected 0 (or less) to 1 (or more)."
        )
    return Calibration(positions, strengths)


def _usable_end(
    order: Sequence[int], knots: Sequence[float], lengths: Sequence[float], median_rate: float, total: float
) -> tuple[int, str]:
    """The last knot, in this order, up to which the images are usable, and why not beyond it."""
    for current, following in pairwise(order):
        rate = _rate(knots, lengths, current, following)
        if rate > JUMP_FACTOR * median_rate:
            return current, "beyond it the image jumps"
        if rate < MIN_CHANGE * total:
            return current, "beyond it nothing changes"
    return order[-1], _NO_MORE_IMAGES


def _rate(knots: Sequence[float], lengths: Sequence[float], index: int, other: int) -> float:
    """Path length per unit of strength between two knots."""
    return (lengths[other] - lengths[index]) / (knots[other] - knots[index])


def _interpolate(x: Sequence[float], y: Sequence[float], new_x: Sequence[float]) -> list[float]:
    """y at new_x by PCHIP, which is monotone where y is; exactly y at values of x."""
    exact = dict(zip(x, y))
    curve = PchipInterpolator(x, y)
    return [exact[value] if value in exact else float(curve(value)) for value in new_x]


def _calibration_through(points: Sequence[tuple[float, float]]) -> Calibration:
    """Through ascending (position, strength) points, without those too close to the one before; keeps 0 and 1."""
    kept: list[tuple[float, float]] = []
    for position, strength in points:
        if kept and position - kept[-1][0] < _MIN_POSITION_STEP:
            if position not in (0, 1):
                continue
            kept.pop()
        kept.append((position, strength))
    positions, strengths = zip(*((round(a, _DECIMALS), round(b, _DECIMALS)) for a, b in kept))
    return Calibration(positions, strengths)


def _parse_ascending(values: object, name: str) -> Strengths:
    """At least two ascending numbers. Raises SliderError for anything else."""
    if not isinstance(values, list) or len(values) < 2:
        raise SliderError(f"The curve's {name} are {values!r}; expected a list of at least two numbers.")
    numbers = validate_strengths(values, f"The curve's {name}")
    if any(b <= a for a, b in pairwise(numbers)):
        raise SliderError(f"The curve's {name} are {values!r}; expected ascending values without duplicates.")
    return numbers
