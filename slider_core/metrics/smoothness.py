"""How evenly pictures change in a row, from the distances between them (Kontinuous Kontext, section 4 and A.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ..errors import SliderError


def first_order(adjacent: Sequence[float]) -> float:
    """Share of the largest of the distances between neighbours in their sum: 1 / len is perfectly even, 1 a jump.

    Raises SliderError when nothing changes at all.
    """
    total = total_change(adjacent)
    return max(adjacent) / total


def triangle_deficits(adjacent: Sequence[float], skipping: Sequence[float]) -> list[float]:
    """For each inner picture the detour over it: (d(a, b) + d(b, c) - d(a, c)) / d(a, c); infinite where a equals c.

    adjacent: d(I_k, I_k+1). skipping: d(I_k, I_k+2), one less.
    """
    if len(skipping) != len(adjacent) - 1:
        raise SliderError(
            f"{len(adjacent)} distances between neighbours go with {len(adjacent) - 1} over a picture; found "
            f"{len(skipping)}."
        )
    deficits = []
    for (one, two), direct in zip(pairwise(adjacent), skipping):
        detour = one + two - direct
        deficits.append(detour / direct if direct else math.inf if detour else 0.0)
    return deficits


def delta_smooth(adjacent: Sequence[float], skipping: Sequence[float]) -> float:
    """The largest triangle deficit: smaller is smoother. Raises SliderError for fewer than three pictures."""
    deficits = triangle_deficits(adjacent, skipping)
    if not deficits:
        raise SliderError("How smoothly pictures change can be said of three or more; found two.")
    return max(deficits)


def kl_to_uniform(adjacent: Sequence[float]) -> float:
    """KL divergence, in nats, of the normalised distances from equal ones; 0 = even.

    Raises SliderError when nothing changes at all.
    """
    total = total_change(adjacent)
    shares = (distance / total for distance in adjacent if distance > 0)
    return sum(share * math.log(share * len(adjacent)) for share in shares)


def total_change(adjacent: Sequence[float]) -> float:
    """Sum of the distances between neighbors. Raises SliderError when they are invalid or all zero."""
    if not adjacent or not all(math.isfinite(distance) and distance >= 0 for distance in adjacent):
        raise SliderError(f"{list(adjacent)} are no distances between pictures; expected at least one, none below 0.")
    if not sum(adjacent):
        raise SliderError("All pictures are equal, so nothing can be said of how evenly they change.")
    return math.fsum(adjacent)
