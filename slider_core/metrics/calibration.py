"""Calibration of a slider: from positions, which the user moves, to strengths, so that equal moves change equally much.

Sources of the idea: Kontinuous Kontext's re-mapped strengths (section 4), and the perceptually even slider ranges of
text-embedding steering (arXiv 2603.17998).
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

NOTHING = 0.02
"""Share of what changes from strength 0 to 1: what changes less is not worth moving the slider for."""
JUMP = 4.0
"""Below strength 0 and above 1 the pictures break where they change this many times as fast as usual between them."""
BACK = 0.9
"""Above strength 1 the edit goes back where the distance to the source falls below this share of that at 1."""

_DIGITS = 4
_DRAWN = 65
_LEAST_MOVE = 0.005
_NOT_FURTHER = "no pictures were made further on"
_EXAMPLE = '{"positions": [0, 0.5, 1], "strengths": [0.2, 0.7, 1]}'


@dataclass(frozen=True)
class Calibration:
    """A monotone curve through points: position 0 = the edit begins, 1 = strength 1. Both rise, two points or more."""

    positions: Strengths
    strengths: Strengths

    def strength(self, positions: Sequence[float]) -> Strengths:
        """The method's strengths: by PCHIP between the points; beyond them linear, as steep as from 0 to 1 on average.

        Raises SliderError where one is beyond what a strength can be.
        """
        curve, asked = PchipInterpolator(self.positions, self.strengths), np.asarray(positions, np.float64)
        inside = asked.clip(self.positions[0], self.positions[-1])
        begin, full = curve([0.0, 1.0])
        found = curve(inside) + (asked - inside) * (full - begin)
        return validate_strengths(found.round(6).tolist(), "The calibrated strength")

    def drawn(self) -> list[tuple[float, float]]:
        """Positions and strengths to draw the curve by, its own points among them."""
        even = np.linspace(self.positions[0], self.positions[-1], _DRAWN).tolist()
        places = sorted({*self.positions, *even})
        return list(zip(places, self.strength(places)))

    def as_text(self) -> str:
        """Short JSON, which parse_calibration reads back to the same curve."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Calibrated:
    """calibration, with in words why it ends where it does, below and above; way: (strength, position) measured."""

    calibration: Calibration
    below: str
    above: str
    way: tuple[tuple[float, float], ...]

    def report(self, compared_by: str) -> str:
        """For people to read."""
        curve = self.calibration
        [begin] = curve.strength([0.0])
        return "\n".join(
            [
                f"Calibrated by {len(self.way)} pictures, compared by {compared_by}.",
                f"Position 0 is strength {begin:g}: up to there less than {NOTHING:.0%} of the edit happens.",
                "Position 1 is strength 1.",
                f"Useful from position {curve.positions[0]:g} (strength {curve.strengths[0]:g}; {self.below}) to "
                f"{curve.positions[-1]:g} (strength {curve.strengths[-1]:g}; {self.above}).",
            ]
        )

    def before_and_after(self) -> tuple[list[float], dict[str, list[float]]]:
        """How much of the edit is there at strengths, and at positions, from 0 to 1; as far as the pictures tell."""
        places = np.linspace(0, 1, 21).tolist()
        strengths, changed = zip(*self.way)
        before, after = (
            np.interp(at, strengths, changed).tolist() for at in (places, self.calibration.strength(places))
        )
        return places, {"even": places, "before, by strength": before, "after, by position": after}


def calibrate(strengths: Sequence[float], distances: ImageDistances) -> Calibrated:
    """The curve by which equal moves change pictures equally much, summed over neighbours.

    Position 0 is the last strength from 0 on until which less than NOTHING of the change up to strength 1 has
    happened; position 1 is strength 1. The curve goes on as far as pictures were made, unless they stop to change,
    jump or come back before. Distances that waver do no harm: their sum rises.
    Raises SliderError where strengths do not reach from 0 to 1, or nothing changes between them.
    """
    check_sweep(strengths, len(distances.from_source))
    if strengths[0] > 0 or strengths[-1] < 1:
        raise SliderError(
            f"The strengths go from {strengths[0]:g} to {strengths[-1]:g}; expected pictures from 0 (or less) to 1 (or "
            "more), best nine or more."
        )
    knots = sorted({*strengths, 0.0, 1.0})
    way = _between(strengths, [0.0, *accumulate(distances.lengths())], knots)
    zero, one = knots.index(0.0), knots.index(1.0)
    whole = way[one] - way[zero]
    if not whole > 0:
        raise SliderError("Nothing changes from strength 0 to 1, so there is nothing to calibrate.")
    start = max(k for k in range(zero, one) if way[k] - way[zero] <= NOTHING * whole)
    usual = median((way[k + 1] - way[k]) / (knots[k + 1] - knots[k]) for k in range(start, one))
    low, below = _reach(range(zero, -1, -1), knots, way, usual, whole)
    far = _between(strengths, distances.as_lengths(distances.from_source), knots)
    kept = next((k for k in range(one, len(knots)) if far[k] < BACK * far[one]), len(knots))
    high, above = _reach(range(one, kept), knots, way, usual, whole)
    if high == kept - 1 < len(knots) - 1:
        above = "beyond it the edit goes back"
    position = [(changed - way[start]) / (way[one] - way[start]) for changed in way]
    points = [(position[k], knots[k]) for k in (*range(low, zero), *range(start, high + 1))]
    measured = zip(strengths, _between(knots, position, strengths))
    return Calibrated(_curve(points), below, above, tuple(measured))


def parse_calibration(text: str) -> Calibration | None:
    """Read what as_text wrote; None for empty text. Raises SliderError for anything that is no rising curve."""
    if not text.strip():
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise SliderError(f"The curve is no JSON: {text[:60]!r}. Expected text such as {_EXAMPLE}.") from None
    if not isinstance(content, dict) or set(content) != {"positions", "strengths"}:
        raise SliderError(f"The curve must have 'positions' and 'strengths' and nothing else, such as {_EXAMPLE}.")
    positions, strengths = (_rising(content[name], name) for name in ("positions", "strengths"))
    if len(positions) != len(strengths):
        raise SliderError(f"The curve has {len(positions)} positions and {len(strengths)} strengths; expected as many.")
    if positions[0] > 0 or positions[-1] < 1:
        raise SliderError(
            f"The curve's positions go from {positions[0]:g} to {positions[-1]:g}; expected 0 (or less) to 1 (or more)."
        )
    return Calibration(positions, strengths)


def _reach(
    order: Sequence[int], knots: Sequence[float], way: Sequence[float], usual: float, whole: float
) -> tuple[int, str]:
    """How far the pictures can be used, going through knots in this order, and why not further."""
    for one, other in pairwise(order):
        rate = (way[other] - way[one]) / (knots[other] - knots[one])
        if rate > JUMP * usual:
            return one, "beyond it the pictures jump"
        if rate < NOTHING * whole:
            return one, "beyond it nothing changes any more"
    return order[-1], _NOT_FURTHER


def _between(across: Sequence[float], values: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Values at other places, monotone where the values are; the same at the same places."""
    known = dict(zip(across, values))
    curve = PchipInterpolator(across, values)
    return [known[place] if place in known else float(curve(place)) for place in wanted]


def _curve(points: Sequence[tuple[float, float]]) -> Calibration:
    """Through points that rise; those that hardly move the slider are left out, but never positions 0 and 1."""
    kept: list[tuple[float, float]] = []
    for position, strength in points:
        if kept and position - kept[-1][0] < _LEAST_MOVE:
            if position not in (0, 1):
                continue
            kept.pop()
        kept.append((position, strength))
    positions, strengths = zip(*((round(a, _DIGITS), round(b, _DIGITS)) for a, b in kept))
    return Calibration(positions, strengths)


def _rising(values: object, name: str) -> Strengths:
    """Two numbers or more, each above the last. Raises SliderError."""
    if not isinstance(values, list) or len(values) < 2:
        raise SliderError(f"The curve's {name} are {values!r}; expected a list of two numbers or more.")
    numbers = validate_strengths(values, f"The curve's {name}")
    if any(b <= a for a, b in pairwise(numbers)):
        raise SliderError(f"The curve's {name} are {values!r}; expected each to be above the one before.")
    return numbers
