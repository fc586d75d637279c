"""Reads back from any picture, also a blurred or noisy one, what has become of a scene, and how true that is to edits.

Nothing here knows what was asked when it measures: only where the scene's objects are, for no edit moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from .edits import Edit
from .synthetic_scenes import (
    APART,
    GROWTH,
    OBJECTS,
    SIDE,
    SIZE_OF,
    Attribute,
    Colour,
    Looks,
    Object,
    Scene,
    away,
    covered,
    drawn,
    edge_at,
    numbers,
)

COLOUR_TOLERANCE = 0.06
"""RGB distance, 15 of 255 in one channel: under a third of the least full change, 0.2."""
SIZE_TOLERANCE = 0.5
"""Pixels: a quarter of the least full change, 2; over twice what noise of 0.03 and half the resolution misread."""
SEEN = 0.05
"""RGB distance from the background below which there is no object: its size is 0."""

_CORE = 1.5
_RIM = 2.0
"""How far from an edge blur may mix the colours of its sides, pixels."""
_STEP = 0.25


@dataclass(frozen=True)
class Attributes(Looks):
    """What a picture shows. residual: RMS over pixels and channels, 0 to 1, of what the redrawn scene leaves over."""

    residual: float


def measured(picture: np.ndarray, scene: Scene) -> Attributes:
    """What a (SIDE, SIDE, 3) picture, 0 to 1, shows where the scene has its objects.

    Colours are medians over pixels that can be nothing else. A size is the best fit by least squares, then refined to
    the area that the object seems to cover, which blur does not change.
    Raises ValueError when the picture is of another shape or not finite.
    """
    pixels = np.asarray(picture, np.float64)
    if pixels.shape != (SIDE, SIDE, 3) or not np.isfinite(pixels).all():
        raise ValueError(f"Expected finite numbers of shape ({SIDE}, {SIDE}, 3), found {pixels.shape}.")
    outside = np.logical_and.reduce([edge_at(scene, thing) > _reach(scene, thing) for thing in OBJECTS])
    background = _median(pixels[outside])
    circle_colour, circle_size = _object(pixels, scene, "circle", background)
    square_colour, square_size = _object(pixels, scene, "square", background)
    found = Looks(circle_colour, square_colour, background, circle_size, square_size)
    redrawn = drawn(replace(scene, **vars(found)))
    return Attributes(**vars(found), residual=float(np.sqrt(np.mean((redrawn - pixels) ** 2))))


def edit_reached(edit: Edit, scene: Scene, found: Looks) -> float:
    """The strength at which the edit's path, taken as a line without end, is nearest to what was found.

    0 is the source and 1 the full edit. What is beside the path does not count: see beside_path.
    """
    start, change = _line(edit, scene)
    return float((numbers(found, edit.attribute) - start) @ change / (change @ change))


def beside_path(edit: Edit, scene: Scene, found: Looks) -> float:
    """How far the edited attribute is from its path's nearest place, in tolerances; of sizes always 0."""
    start, change = _line(edit, scene)
    nearest = start + edit_reached(edit, scene, found) * change
    return _apart(edit.attribute, nearest, numbers(found, edit.attribute))


def drift(edits: Sequence[Edit], scene: Scene, found: Looks) -> float:
    """The largest change of an attribute that none of the edits is about, in tolerances: 1 is just within."""
    edited = {edit.attribute for edit in edits}
    return max(change for attribute, change in deviations(scene, found).items() if attribute not in edited)


def deviations(true: Looks, found: Looks) -> dict[Attribute, float]:
    """How far each attribute is from what it should be, in tolerances."""
    attributes: tuple[Attribute, ...] = get_args(Attribute)
    return {one: _apart(one, numbers(true, one), numbers(found, one)) for one in attributes}


def as_wanted(true: Looks, found: Looks) -> bool:
    """Whether every attribute is within its tolerance."""
    return max(deviations(true, found).values()) <= 1


def _apart(attribute: Attribute, true: np.ndarray, found: np.ndarray) -> float:
    tolerance = SIZE_TOLERANCE if attribute in SIZE_OF.values() else COLOUR_TOLERANCE
    return float(np.linalg.norm(found - true)) / tolerance


def _line(edit: Edit, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The attribute at strength 0, and its change from there to 1."""
    start = numbers(scene, edit.attribute)
    return start, numbers(edit.at(scene, 1), edit.attribute) - start


def _reach(scene: Scene, thing: Object) -> float:
    """The size beyond which even a blurred rim of the object never comes."""
    return getattr(scene, SIZE_OF[thing]) * GROWTH + APART / 2


def _object(pixels: np.ndarray, scene: Scene, thing: Object, background: Colour) -> tuple[Colour, float]:
    """Its colour and size: first by its innermost pixels, then again by all that seem to be inside it."""
    size = 0.0
    for _ in range(2):
        inside = edge_at(scene, thing) <= max(size - _RIM, _CORE)
        colour = _median(pixels[inside])
        size = _size(pixels, scene, thing, background, colour)
    return colour, size


def _size(pixels: np.ndarray, scene: Scene, thing: Object, background: Colour, colour: Colour) -> float:
    """The size that explains best how much of the object's colour each pixel has; 0 when there is none."""
    contrast = np.subtract(colour, background)
    if np.linalg.norm(contrast) < SEEN:
        return 0.0
    [other] = set(OBJECTS) - {thing}
    own = (edge_at(scene, thing) <= _reach(scene, thing) + APART) & (edge_at(scene, other) > _reach(scene, other))
    shares = (pixels[own] - background) @ contrast / (contrast @ contrast)
    across, down = (part[own] for part in away(scene, thing))
    sizes = np.arange(_STEP, _reach(scene, thing), _STEP)
    misfits = ((covered(thing, across, down, sizes[:, None]) - np.clip(shares, 0, 1)) ** 2).sum(1)
    best = sizes[misfits.argmin()]
    near = edge_at(scene, thing)[own] <= best + 2 * _RIM
    sizes = best + np.linspace(-0.5, 0.5, 51)
    areas = covered(thing, across[near], down[near], sizes[:, None]).sum(1)
    return float(np.interp(shares[near].sum(), areas, sizes))


def _median(colours: np.ndarray) -> Colour:
    """Per channel, of (n, 3)."""
    red, green, blue = np.median(colours, 0).tolist()
    return red, green, blue
