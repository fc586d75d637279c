"""How good a slider is, in numbers, from the distances between the pictures of its sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from statistics import fmean

from ..errors import SliderError
from ..strength import Strengths
from .clip_direction import ClipMeasures
from .image_distance import ImageDistances
from .smoothness import delta_smooth, first_order, kl_to_uniform


@dataclass(frozen=True)
class Linearity:
    """Distance of a curve, 0 to 1, from the straight line: mean and largest over the pictures; 0 = proportional."""

    mean: float
    largest: float


@dataclass(frozen=True)
class SweepMetrics:
    """All that is known of a sweep; strengths and pictures in the same order.

    first_order, delta_smooth, kl_to_uniform: see smoothness.py; they speak of the pictures as they are, so they tell of
    the slider only when the strengths are evenly spaced. delta_smooth is None for two pictures, infinite where a
    picture comes back.
    path: linearity of the way along the pictures, the sum of adjacent lengths (ImageDistances), against the strength.
    direct: the same of the distance to the source, counted negative below it; None where the last picture equals it.
    similarity: 1 - distance to the source, per picture.
    clip: see clip_direction.py. outside: share of the change outside of a region, see picture_distance.share_outside.
    """

    strengths: Strengths
    distances: ImageDistances
    first_order: float
    delta_smooth: float | None
    kl_to_uniform: float
    path: Linearity
    direct: Linearity | None
    similarity: tuple[float, ...]
    clip: ClipMeasures | None = None
    outside: tuple[float | None, ...] | None = None

    def as_json(self) -> str:
        """Everything, what is infinite as null."""
        return json.dumps(_finite(asdict(self)), indent=1)

    def curves(self) -> dict[str, Sequence[float]]:
        """To be drawn against the strengths."""
        return {
            "way along the pictures": [0.0, *accumulate(self.distances.adjacent)],
            "distance to the source": self.distances.from_source,
        }

    def report(self) -> str:
        """For people to read."""
        lines = [
            f"{len(self.strengths)} pictures, compared by {self.distances.compared_by}",
            f"first order {self.first_order:.3f} (even: {1 / len(self.distances.adjacent):.3f})",
            f"delta_smooth {_shown(self.delta_smooth)} (smaller is smoother)",
            f"KL to uniform {self.kl_to_uniform:.3f} nats (even: 0)",
            f"linearity of the path: off by {self.path.mean:.3f} in the mean, {self.path.largest:.3f} at most",
        ]
        if self.direct is not None:
            lines.append(
                f"linearity of the distance to the source: off by {self.direct.mean:.3f} in the mean, "
                f"{self.direct.largest:.3f} at most"
            )
        columns: dict[str, Sequence[float | None]] = {
            "strength": self.strengths,
            "from source": self.distances.from_source,
            "similar": self.similarity,
        }
        if self.clip is not None:
            columns |= {"CLIP-dir": self.clip.direction, "to edit": self.clip.to_edit, "to source": self.clip.to_source}
        if self.outside is not None:
            columns |= {"outside": self.outside}
        lines += ["", " | ".join(columns)]
        lines += [" | ".join(map(_shown, row)) for row in zip(*columns.values())]
        return "\n".join(lines)


def measure(
    strengths: Sequence[float],
    distances: ImageDistances,
    clip: ClipMeasures | None = None,
    outside: tuple[float | None, ...] | None = None,
) -> SweepMetrics:
    """Measure a sweep. Raises SliderError where strengths and pictures do not go together or nothing changes."""
    check_sweep(strengths, len(distances.from_source))
    return SweepMetrics(
        tuple(strengths),
        distances,
        first_order(distances.adjacent),
        delta_smooth(distances.adjacent, distances.skipping) if distances.skipping else None,
        kl_to_uniform(distances.adjacent),
        linearity(strengths, [0.0, *accumulate(distances.lengths())]),
        _direct(strengths, distances.as_lengths(distances.from_source)),
        tuple(1 - distance for distance in distances.from_source),
        clip,
        outside,
    )


def linearity(across: Sequence[float], curve: Sequence[float]) -> Linearity:
    """|y - x| over all points, both axes moved and scaled so that the first point is (0, 0) and the last (1, 1).

    Raises SliderError where the curve ends as high as it began.
    """
    rise = curve[-1] - curve[0]
    if not rise:
        raise SliderError("The last picture is like the first, so nothing can be said of how steadily they change.")
    span = across[-1] - across[0]
    off = [abs((y - curve[0]) / rise - (x - across[0]) / span) for x, y in zip(across, curve)]
    return Linearity(fmean(off), max(off))


def check_sweep(strengths: Sequence[float], pictures: int) -> None:
    """Raise SliderError unless there is a strength for each of two pictures or more, in rising order."""
    if len(strengths) != pictures:
        raise SliderError(
            f"There are {pictures} pictures and {len(strengths)} strengths; expected as many. Link the list of "
            "strengths that the pictures were rendered with."
        )
    if pictures < 2:
        raise SliderError("There is one picture; expected two or more, one per strength.")
    if any(b <= a for a, b in pairwise(strengths)):
        shown = ", ".join(f"{strength:g}" for strength in strengths)
        raise SliderError(f"The strengths are {shown}; expected them to rise from each picture to the next.")


def source_of(strengths: Sequence[float]) -> int:
    """The picture that is nearest to the source: that of the strength nearest to 0."""
    return min(range(len(strengths)), key=lambda k: abs(strengths[k]))


def _direct(strengths: Sequence[float], from_source: Sequence[float]) -> Linearity | None:
    zero = strengths[source_of(strengths)]
    signed = [math.copysign(distance, strength - zero) for strength, distance in zip(strengths, from_source)]
    return linearity(strengths, signed) if signed[-1] > signed[0] else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
