"""Metrics of a slider from the image distances of a sweep.

In addition to those of smoothness.py: linearity, the deviation |y - x| of a curve from the diagonal, where x is the
strength and y the path length along the images or the distance from the source, both scaled to 0 .. 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Any

from ..errors import SliderError
from ..strength import Strengths
from .clip_direction import ClipScores
from .image_distance import ImageDistances
from .smoothness import delta_smooth, first_order, kl_to_uniform


@dataclass(frozen=True)
class Linearity:
    """Mean and largest deviation of a curve from a straight line, 0 to 1; 0 = proportional to the strength."""

    mean: float
    largest: float


@dataclass(frozen=True)
class SweepMetrics:
    """All metrics of a sweep; tuples have one value per image.

    first_order, delta_smooth, kl_to_uniform: see smoothness.py. They describe the images as given, so they describe the
    slider only if the strengths are evenly spaced. delta_smooth is None for two images, and infinite where an image
    equals the one two before it.
    path_linearity: of the cumulative path length (ImageDistances.path_lengths) over the strength.
    source_linearity: of the distance from the source over the strength, negative below the source's strength; None
    unless the last image is further from the source than the first.
    similarity: 1 - distance from the source. clip_scores: see clip_direction.py.
    fraction_outside: see image_distance.fraction_outside_mask.
    """

    strengths: Strengths
    distances: ImageDistances
    first_order: float
    delta_smooth: float | None
    kl_to_uniform: float
    path_linearity: Linearity
    source_linearity: Linearity | None
    similarity: tuple[float, ...]
    clip_scores: ClipScores | None = None
    fraction_outside: tuple[float | None, ...] | None = None

    def as_json(self) -> str:
        """All values; infinite ones are null."""
        return json.dumps(_without_infinities(self._as_dict()), indent=1)

    def _as_dict(self) -> dict[str, Any]:
        distances = self.distances
        return {
            "strengths": self.strengths,
            "distances": {
                "compared_by": distances.metric_name,
                "adjacent": distances.adjacent,
                "skipping": distances.skip_one,
                "from_source": distances.from_source,
                "squared": distances.squared,
            },
            "first_order": self.first_order,
            "delta_smooth": self.delta_smooth,
            "kl_to_uniform": self.kl_to_uniform,
            "path": asdict(self.path_linearity),
            "direct": self.source_linearity and asdict(self.source_linearity),
            "similarity": self.similarity,
            "clip": self.clip_scores and asdict(self.clip_scores),
            "outside": self.fraction_outside,
        }

    def curves(self) -> dict[str, Sequence[float]]:
        """Label -> y values, one per strength."""
        return {
            "path length along the images": [0.0, *accumulate(self.distances.adjacent)],
            "distance from the source": self.distances.from_source,
        }

    def report(self) -> str:
        """Readable text: the metrics, then a table with a row per image."""
        lines = [
            f"{len(self.strengths)} images, compared by {self.distances.metric_name}",
            f"first order {self.first_order:.3f} (even: {1 / len(self.distances.adjacent):.3f})",
            f"delta_smooth {_format(self.delta_smooth)} (smaller is smoother)",
            f"KL to uniform {self.kl_to_uniform:.3f} nats (even: 0)",
            f"linearity of the path length: {_deviation(self.path_linearity)}",
        ]
        if self.source_linearity is not None:
            lines.append(f"linearity of the distance from the source: {_deviation(self.source_linearity)}")
        columns: dict[str, Sequence[float | None]] = {
            "strength": self.strengths,
            "from source": self.distances.from_source,
            "similarity": self.similarity,
        }
        if self.clip_scores is not None:
            columns["CLIP-dir"] = self.clip_scores.direction
            columns["to edit"] = self.clip_scores.to_edit
            columns["to source"] = self.clip_scores.to_source
        if self.fraction_outside is not None:
            columns["outside"] = self.fraction_outside
        lines += ["", " | ".join(columns)]
        lines += [" | ".join(map(_format, row)) for row in zip(*columns.values())]
        return "\n".join(lines)


def measure_sweep(
    strengths: Sequence[float],
    distances: ImageDistances,
    clip_scores: ClipScores | None = None,
    fraction_outside: tuple[float | None, ...] | None = None,
) -> SweepMetrics:
    """All metrics of a sweep. Raises SliderError when strengths and images do not match, or nothing changes."""
    check_sweep(strengths, len(distances.from_source))
    return SweepMetrics(
        tuple(strengths),
        distances,
        first_order(distances.adjacent),
        delta_smooth(distances.adjacent, distances.skip_one) if distances.skip_one else None,
        kl_to_uniform(distances.adjacent),
        linearity(strengths, [0.0, *accumulate(distances.path_lengths())]),
        _source_linearity(strengths, distances.to_lengths(distances.from_source)),
        tuple(1 - distance for distance in distances.from_source),
        clip_scores,
        fraction_outside,
    )


def linearity(x: Sequence[float], y: Sequence[float]) -> Linearity:
    """Deviation |y - x| over all points, after scaling both so that the first point is (0, 0) and the last (1, 1).

    Raises SliderError when the last y equals the first.
    """
    rise = y[-1] - y[0]
    if not rise:
        raise SliderError("The last image equals the first, so the linearity of the change is undefined.")
    span = x[-1] - x[0]
    deviations = [abs((b - y[0]) / rise - (a - x[0]) / span) for a, b in zip(x, y)]
    return Linearity(fmean(deviations), max(deviations))


def check_sweep(strengths: Sequence[float], num_images: int) -> None:
    """Raise SliderError unless there are at least two images, and an ascending list of one strength per image."""
    if len(strengths) != num_images:
        raise SliderError(
            f"There are {num_images} images and {len(strengths)} strengths; expected the same number. Link the list of "
            "strengths that the images were rendered with."
        )
    if num_images < 2:
        raise SliderError("There is one image; expected at least two, one per strength.")
    if any(b <= a for a, b in pairwise(strengths)):
        values = ", ".join(f"{strength:g}" for strength in strengths)
        raise SliderError(f"The strengths are {values}; expected ascending values without duplicates.")


def source_index_of(strengths: Sequence[float]) -> int:
    """Index of the image that represents the source: the one whose strength is nearest to 0."""
    return min(range(len(strengths)), key=lambda k: abs(strengths[k]))


def _source_linearity(strengths: Sequence[float], from_source: Sequence[float]) -> Linearity | None:
    zero = strengths[source_index_of(strengths)]
    signed = [math.copysign(distance, strength - zero) for strength, distance in zip(strengths, from_source)]
    return linearity(strengths, signed) if signed[-1] > signed[0] else None


def _deviation(linearity: Linearity) -> str:
    return f"off by {linearity.mean:.3f} on average, {linearity.largest:.3f} at most"


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _without_infinities(value: object) -> object:
    """The value with all infinities and NaNs in it replaced by None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
