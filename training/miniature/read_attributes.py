"""Measures the attributes of a scene in an image, which may be blurred or noisy, and compares them with edits.

The measurement uses only the positions of the objects, which no edit changes; it does not use the edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from .edits import Edit
from .synthetic_scenes import (
    MAX_GROWTH,
    MIN_GAP,
    OBJECTS,
    SIDE,
    SIZE_OF,
    Attribute,
    Color,
    ObjectName,
    Scene,
    SceneAttributes,
    attribute_values,
    center_distances,
    draw_scene,
    edge_size,
    pixel_coverage,
)

COLOR_TOLERANCE = 0.06
"""RGB distance: 15 of 255 in one channel, less than a third of the smallest change at strength 1, 0.2."""
SIZE_TOLERANCE = 0.5
"""Pixels: a quarter of the smallest change at strength 1, and over twice the error under noise of 0.03 and blur."""
MIN_VISIBLE_CONTRAST = 0.05
"""RGB distance from the background below which an object counts as missing, with size 0."""

_CORE = 1.5
_RIM = 2.0
"""Distance from an edge, in pixels, within which blur may mix the colors of its sides."""
_STEP = 0.25


@dataclass(frozen=True)
class MeasuredAttributes(SceneAttributes):
    """residual: RMS difference, over pixels and channels, between the image and the scene redrawn from it, 0 to 1."""

    residual: float


def read_attributes(image: np.ndarray, scene: Scene) -> MeasuredAttributes:
    """Measure an image (SIDE, SIDE, 3), 0 to 1, at the positions of the scene's objects.

    Colors are medians over pixels that can show nothing else. A size is fitted by least squares, then refined so that
    the covered area, which blur does not change, agrees. Raises ValueError for a wrong shape or non-finite values.
    """
    pixels = np.asarray(image, np.float64)
    if pixels.shape != (SIDE, SIDE, 3) or not np.isfinite(pixels).all():
        raise ValueError(f"Expected finite numbers of shape ({SIDE}, {SIDE}, 3), found {pixels.shape}.")
    outside = np.logical_and.reduce([edge_size(scene, name) > _max_extent(scene, name) for name in OBJECTS])
    background = _median_color(pixels[outside])
    circle_color, circle_size = _read_object(pixels, scene, "circle", background)
    square_color, square_size = _read_object(pixels, scene, "square", background)
    attributes = SceneAttributes(circle_color, square_color, background, circle_size, square_size)
    redrawn = draw_scene(replace(scene, **vars(attributes)))
    return MeasuredAttributes(**vars(attributes), residual=float(np.sqrt(np.mean((redrawn - pixels) ** 2))))


def reached_strength(edit: Edit, scene: Scene, measured: SceneAttributes) -> float:
    """The strength at which the edit, extended linearly, is closest to the measured attribute: 0 source, 1 full edit.

    Deviations perpendicular to the edit are ignored; see path_deviation.
    """
    start, change = _edit_line(edit, scene)
    return float((attribute_values(measured, edit.attribute) - start) @ change / (change @ change))


def path_deviation(edit: Edit, scene: Scene, measured: SceneAttributes) -> float:
    """Distance of the measured attribute from the edit, extended linearly, in tolerances; 0 for sizes."""
    start, change = _edit_line(edit, scene)
    nearest = start + reached_strength(edit, scene, measured) * change
    return _deviation(edit.attribute, nearest, attribute_values(measured, edit.attribute))


def drift(edits: Sequence[Edit], scene: Scene, measured: SceneAttributes) -> float:
    """The largest change of an attribute that none of the edits changes, in tolerances."""
    edited = {edit.attribute for edit in edits}
    return max(change for attribute, change in deviations(scene, measured).items() if attribute not in edited)


def deviations(expected: SceneAttributes, measured: SceneAttributes) -> dict[Attribute, float]:
    """The distance of each measured attribute from its expected value, in tolerances."""
    attributes: tuple[Attribute, ...] = get_args(Attribute)
    return {
        name: _deviation(name, attribute_values(expected, name), attribute_values(measured, name))
        for name in attributes
    }


def within_tolerance(expected: SceneAttributes, measured: SceneAttributes) -> bool:
    """Whether every attribute is within its tolerance."""
    return max(deviations(expected, measured).values()) <= 1


def _deviation(attribute: Attribute, expected: np.ndarray, measured: np.ndarray) -> float:
    tolerance = SIZE_TOLERANCE if attribute in SIZE_OF.values() else COLOR_TOLERANCE
    return float(np.linalg.norm(measured - expected)) / tolerance


def _edit_line(edit: Edit, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The attribute at strength 0, and its change from strength 0 to 1."""
    start = attribute_values(scene, edit.attribute)
    return start, attribute_values(edit.at(scene, 1), edit.attribute) - start


def _max_extent(scene: Scene, name: ObjectName) -> float:
    """The size that an edited object never exceeds, including a blurred rim."""
    return getattr(scene, SIZE_OF[name]) * MAX_GROWTH + MIN_GAP / 2


def _read_object(pixels: np.ndarray, scene: Scene, name: ObjectName, background: Color) -> tuple[Color, float]:
    """Color and size of an object: from its innermost pixels, then again from all pixels inside the fitted size."""
    size = 0.0
    for _ in range(2):
        inside = edge_size(scene, name) <= max(size - _RIM, _CORE)
        color = _median_color(pixels[inside])
        size = _fit_size(pixels, scene, name, background, color)
    return color, size


def _fit_size(pixels: np.ndarray, scene: Scene, name: ObjectName, background: Color, color: Color) -> float:
    """The size that best explains the fraction of the object's color in each pixel; 0 without contrast."""
    contrast = np.subtract(color, background)
    if np.linalg.norm(contrast) < MIN_VISIBLE_CONTRAST:
        return 0.0
    [other] = set(OBJECTS) - {name}
    nearby = edge_size(scene, name) <= _max_extent(scene, name) + MIN_GAP
    region = nearby & (edge_size(scene, other) > _max_extent(scene, other))
    fractions = (pixels[region] - background) @ contrast / (contrast @ contrast)
    dx, dy = (distances[region] for distances in center_distances(scene, name))
    sizes = np.arange(_STEP, _max_extent(scene, name), _STEP)
    errors = ((pixel_coverage(name, dx, dy, sizes[:, None]) - np.clip(fractions, 0, 1)) ** 2).sum(1)
    best = sizes[errors.argmin()]
    near_edge = edge_size(scene, name)[region] <= best + 2 * _RIM
    sizes = best + np.linspace(-0.5, 0.5, 51)
    areas = pixel_coverage(name, dx[near_edge], dy[near_edge], sizes[:, None]).sum(1)
    return float(np.interp(fractions[near_edge].sum(), areas, sizes))


def _median_color(colors: np.ndarray) -> Color:
    """The median of each channel of (n, 3)."""
    red, green, blue = np.median(colors, 0).tolist()
    return red, green, blue
