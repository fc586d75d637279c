"""Smoothness of a sweep from its image distances (Kontinuous Kontext, arXiv 2510.08532, sections 4 and A.1).

With d an image distance and I_0 ... I_n the images in the order of their strengths:

    first order  = max_k d(I_k, I_k+1) / sum_k d(I_k, I_k+1)
    deficit_k    = (d(I_k-1, I_k) + d(I_k, I_k+1) - d(I_k-1, I_k+1)) / d(I_k-1, I_k+1)
    delta_smooth = max_k deficit_k
    KL           = sum_k p_k ln(n p_k),    p_k = d(I_k, I_k+1) / sum_j d(I_j, I_j+1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ..errors import SliderError


def first_order(adjacent: Sequence[float]) -> float:
    """Largest distance between neighbors as a fraction of their sum: 1 / n = even, 1 = a single jump.

    adjacent: the n distances d(I_k, I_k+1). Raises SliderError when nothing changes.
    """
    total = total_change(adjacent)
    return max(adjacent) / total


def triangle_deficits(adjacent: Sequence[float], skip_one: Sequence[float]) -> list[float]:
    """deficit_k of each inner image: the relative detour over it; infinite where its two neighbors are equal.

    adjacent: the n distances d(I_k, I_k+1). skip_one: the n - 1 distances d(I_k, I_k+2).
    """
    if len(skip_one) != len(adjacent) - 1:
        raise SliderError(
            f"There are {len(adjacent)} distances between neighbors and {len(skip_one)} between images two apart; "
            f"expected {len(adjacent) - 1} of the latter."
        )
    deficits = []
    for (first, second), direct in zip(pairwise(adjacent), skip_one):
        detour = first + second - direct
        deficits.append(detour / direct if direct else math.inf if detour else 0.0)
    return deficits


def delta_smooth(adjacent: Sequence[float], skip_one: Sequence[float]) -> float:
    """The largest triangle deficit; smaller is smoother. Raises SliderError for fewer than three images."""
    deficits = triangle_deficits(adjacent, skip_one)
    if not deficits:
        raise SliderError("delta_smooth needs at least three images, but there are two.")
    return max(deficits)


def kl_to_uniform(adjacent: Sequence[float]) -> float:
    """KL divergence of the normalized distances from the uniform distribution, in nats; 0 = even.

    Raises SliderError when nothing changes.
    """
    total = total_change(adjacent)
    fractions = (distance / total for distance in adjacent if distance > 0)
    return sum(fraction * math.log(fraction * len(adjacent)) for fraction in fractions)


def total_change(adjacent: Sequence[float]) -> float:
    """Sum of the distances between neighbors. Raises SliderError when they are invalid or all zero."""
    if not adjacent or not all(math.isfinite(distance) and distance >= 0 for distance in adjacent):
        raise SliderError(
            f"{list(adjacent)} are not distances between images; expected at least one finite number, none below 0."
        )
    if not sum(adjacent):
        raise SliderError("All images are equal, so their smoothness is undefined.")
    return math.fsum(adjacent)
