"""How evenly each method slides on the miniature edit model, measured on validation scenes.

    python run.py benchmark --only slider_quality [--scenes N]

The model is tiny (3 million parameters, 64x64 images of two objects): it shows how methods differ from one another, not
how well they work with FLUX.1. The edit reached is read back from the pixels (training/miniature/read_attributes.py); 1
is the full edit.

One instruction, strengths -0.5 to 1.5:
    reached             the edit reached at 0, 0.5, 1 and 1.5, medians
    monotonic           fraction of scenes in which no step from 0 to 1 goes back by more than 0.02
    linearity           mean distance between edit reached and strength, 0 to 1, after both ends are scaled to fit
    first order         fraction of the total change in the largest of the 8 steps from 0 to 1 (even: 1/8), median
    delta               largest detour (delta_smooth of Kontinuous Kontext), median
    drift               change of the other attributes at 1, in tolerances, median
Two instructions, the first moved from 0 to 1, the other kept at 1:
    other instruction   how far it strays from where it is when both are at 1, largest over the strengths, median
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

import in_training  # noqa: F401  # isort: skip

from slider_core.errors import SliderError
from slider_core.figures.plots import curves_plot
from slider_core.metrics.smoothness import delta_smooth, first_order
from training.examples import tensor_to_pil
from training.miniature.evaluate import validation_tasks
from training.miniature.read_attributes import drift, reached_strength, read_attributes
from training.miniature.slider_methods import METHODS, Miniature

ROOT = Path(__file__).resolve().parents[1]
STRENGTHS = [k / 8 for k in range(-4, 13)]
ZERO, ONE = STRENGTHS.index(0.0), STRENGTHS.index(1.0)
MAX_REGRESSION = 0.02


@dataclass
class Measurements:
    """Measurements of one method, one entry per scene."""

    reached: list[list[float]] = field(default_factory=list)
    first_order: list[float] = field(default_factory=list)
    delta: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    def at(self, strength: float) -> float:
        return float(np.median([values[STRENGTHS.index(strength)] for values in self.reached]))

    def monotonic(self) -> float:
        inner = [values[ZERO : ONE + 1] for values in self.reached]
        return float(np.mean([all(b > a - MAX_REGRESSION for a, b in pairwise(values)) for values in inner]))

    def linearity(self) -> float:
        return float(np.mean([_deviation_from_line(values[ZERO : ONE + 1]) for values in self.reached]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--models", type=Path, default=ROOT / "demo" / "miniature")
    parser.add_argument("--plot", type=Path, help="write the curves to this image file")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args, _ = parser.parse_known_args()
    miniature = Miniature(args.models)
    results = {name: measure(miniature, name, args.scenes) for name in args.methods}
    print("\n".join(table(results)))
    if args.plot:
        lines = {name: [one.at(strength) for strength in STRENGTHS] for name, one in results.items()}
        plot = curves_plot(STRENGTHS, {"ideal": STRENGTHS, **lines}, "strength", "edit reached, median")
        tensor_to_pil(plot[0]).save(args.plot)


def measure(miniature: Miniature, name: str, scenes: int) -> Measurements:
    method, results = METHODS[name], Measurements()
    for source, edits in validation_tasks(scenes, 1):
        images = miniature.render(source, method(miniature, edits, 0, STRENGTHS), len(STRENGTHS))
        readings = [read_attributes(image, source) for image in images]
        results.reached.append([reached_strength(edits[0], source, one) for one in readings])
        results.drift.append(drift(edits, source, readings[ONE]))
        inner = images[ZERO : ONE + 1]
        adjacent = [_rms_difference(a, b) for a, b in pairwise(inner)]
        with contextlib.suppress(SliderError):  # undefined where nothing changes
            results.first_order.append(first_order(adjacent))
            results.delta.append(delta_smooth(adjacent, [_rms_difference(a, b) for a, b in zip(inner, inner[2:])]))
    inner_strengths = STRENGTHS[ZERO : ONE + 1]
    for source, edits in validation_tasks(scenes, 2):
        images = miniature.render(source, method(miniature, edits, 0, inner_strengths), len(inner_strengths))
        kept = [reached_strength(edits[1], source, read_attributes(image, source)) for image in images]
        results.other.append(max(abs(value - kept[-1]) for value in kept))
    print(f"{name}: {scenes} scenes", file=sys.stderr)
    return results


def table(results: dict[str, Measurements]) -> list[str]:
    lines = [
        "| method | reached at 0, 0.5, 1, 1.5 | monotonic | linearity | first order | delta | drift "
        "| other instruction |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in results.items():
        reached = ", ".join(f"{one.at(strength):.2f}" for strength in (0.0, 0.5, 1.0, 1.5))
        numbers = (np.median(values) for values in (one.first_order, one.delta, one.drift, one.other))
        lines.append(
            f"| {name} | {reached} | {one.monotonic():.0%} | {one.linearity():.3f} | "
            + " | ".join(f"{number:.2f}" for number in numbers)
            + " |"
        )
    return lines


def _deviation_from_line(values: Sequence[float]) -> float:
    """Mean distance from the straight line between both ends, relative to their distance; 1 where they are equal."""
    rise = values[-1] - values[0]
    if abs(rise) < MAX_REGRESSION:
        return 1.0
    line = np.linspace(0, 1, len(values))
    return float(np.mean(np.abs((np.array(values) - values[0]) / rise - line)))


def _rms_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))


if __name__ == "__main__":
    main()
