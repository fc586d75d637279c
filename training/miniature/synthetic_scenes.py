"""Scenes of a circle and a square, as attributes and as images. Lengths are in pixels, colors RGB from 0 to 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..examples import tensor_to_pil

Color = tuple[float, float, float]
Point = tuple[float, float]
ObjectName = Literal["circle", "square"]
Attribute = Literal["circle_color", "square_color", "background", "circle_size", "square_size"]

SIDE = 64
OBJECTS: tuple[ObjectName, ...] = ("circle", "square")
COLOR_OF: dict[ObjectName, Attribute] = {"circle": "circle_color", "square": "square_color"}
SIZE_OF: dict[ObjectName, Attribute] = {"circle": "circle_size", "square": "square_size"}
SIZES = (6.0, 8.0)
MIN_SIZE = 2.0
"""Lower limit of edited sizes. The color of smaller objects cannot be told from noise."""
MAX_GROWTH = 1.75
"""Upper limit of edited sizes, relative to the source. Every scene has room for both objects at this size."""
MIN_GAP = 2.0
"""Minimum gap between the objects, and between them and the border, when both have grown by MAX_GROWTH."""

# Channels are within 0.25 to 0.75, so edits extrapolate linearly from strength -0.5 to 1.5 without clipping: 0.27 and
# 0.73 with jitter reach 0.01 and 0.99 there.
COLORS: dict[str, Color] = {
    "red": (0.73, 0.27, 0.27),
    "green": (0.27, 0.73, 0.27),
    "blue": (0.27, 0.27, 0.73),
    "yellow": (0.73, 0.73, 0.27),
    "pink": (0.73, 0.27, 0.73),
    "cyan": (0.27, 0.73, 0.73),
}
TONES: dict[str, Color] = {
    "dark": (0.27, 0.27, 0.27),
    "gray": (0.50, 0.50, 0.50),
    "bright": (0.73, 0.73, 0.73),
    "brown": (0.48, 0.39, 0.29),
}
JITTER = 0.02
"""Maximum deviation of a channel of a scene's color from the named color."""


@dataclass(frozen=True)
class SceneAttributes:
    """The attributes that edits change. The size of a circle is its radius, that of a square half its side."""

    circle_color: Color
    square_color: Color
    background: Color
    circle_size: float
    square_size: float


@dataclass(frozen=True)
class Scene(SceneAttributes):
    """Centers are (x, y) from the upper left corner; pixel k spans k to k + 1."""

    circle_center: Point
    square_center: Point


def attribute_values(attributes: SceneAttributes, attribute: Attribute) -> np.ndarray:
    """The value of an attribute: (3,) for a color, (1,) for a size."""
    return np.atleast_1d(np.asarray(getattr(attributes, attribute), np.float64))


def center_of(scene: Scene, name: ObjectName) -> Point:
    return scene.circle_center if name == "circle" else scene.square_center


def center_distances(scene: Scene, name: ObjectName) -> tuple[np.ndarray, np.ndarray]:
    """|x| and |y| distance of each pixel's center from an object's center, each (SIDE, SIDE)."""
    x, y = center_of(scene, name)
    pixel_y, pixel_x = np.indices((SIDE, SIDE)) + 0.5
    return np.abs(pixel_x - x), np.abs(pixel_y - y)


def edge_size(scene: Scene, name: ObjectName) -> np.ndarray:
    """The size at which the object's edge would pass through each pixel's center, (SIDE, SIDE)."""
    dx, dy = center_distances(scene, name)
    return np.hypot(dx, dy) if name == "circle" else np.maximum(dx, dy)


def pixel_coverage(name: ObjectName, dx: np.ndarray, dy: np.ndarray, size: float | np.ndarray) -> np.ndarray:
    """The fraction of each pixel that an object covers, by the pixel's distance from its center; sizes broadcast.

    Exact for squares. A circle's edge is approximated within a pixel by a line perpendicular to the radius.
    """
    if name == "circle":
        return np.clip(size + 0.5 - np.hypot(dx, dy), 0, 1)
    return np.clip(size + 0.5 - dx, 0, 1) * np.clip(size + 0.5 - dy, 0, 1)


def coverage(scene: Scene, name: ObjectName) -> np.ndarray:
    """The fraction of each pixel that an object covers, (SIDE, SIDE)."""
    return pixel_coverage(name, *center_distances(scene, name), getattr(scene, SIZE_OF[name]))


def draw_scene(scene: Scene) -> np.ndarray:
    """The antialiased image, float32, (SIDE, SIDE, 3)."""
    image = np.broadcast_to(attribute_values(scene, "background"), (SIDE, SIDE, 3))
    for name in OBJECTS:
        image = image + coverage(scene, name)[..., None] * (attribute_values(scene, COLOR_OF[name]) - image)
    return image.astype(np.float32)


def scene_image(scene: Scene) -> Image.Image:
    return tensor_to_pil(torch.from_numpy(draw_scene(scene)))


def smallest_gap(scene: Scene, growth: float = 1.0) -> float:
    """The smallest gap between the objects or to the border with sizes times `growth`; negative if they overlap."""
    to_border = min(
        min(coordinate, SIDE - coordinate) - getattr(scene, SIZE_OF[name]) * growth
        for name in OBJECTS
        for coordinate in center_of(scene, name)
    )
    to_square = [
        max(abs(one - other) - scene.square_size * growth, 0)
        for one, other in zip(scene.circle_center, scene.square_center)
    ]
    return min(to_border, math.hypot(*to_square) - scene.circle_size * growth)


def random_scene(rng: torch.Generator) -> Scene:
    """A random scene with room for both objects when they grow by MAX_GROWTH."""
    circle, square = torch.randperm(len(COLORS), generator=rng)[:2].tolist()
    tone = int(torch.randint(len(TONES), (), generator=rng))
    colors, tones = list(COLORS.values()), list(TONES.values())
    circle_size, square_size = (_uniform(*SIZES, rng) for _ in OBJECTS)
    attributes = {
        "circle_color": _jitter(colors[circle], rng),
        "square_color": _jitter(colors[square], rng),
        "background": _jitter(tones[tone], rng),
    }
    while True:
        scene = Scene(
            **attributes,
            circle_size=circle_size,
            square_size=square_size,
            circle_center=_random_center(circle_size, rng),
            square_center=_random_center(square_size, rng),
        )
        if smallest_gap(scene, MAX_GROWTH) >= MIN_GAP:
            return scene


def _random_center(size: float, rng: torch.Generator) -> Point:
    margin = size * MAX_GROWTH + MIN_GAP
    x, y = (_uniform(margin, SIDE - margin, rng) for _ in range(2))
    return x, y


def _jitter(color: Color, rng: torch.Generator) -> Color:
    red, green, blue = (channel + _uniform(-JITTER, JITTER, rng) for channel in color)
    return red, green, blue


def _uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64).item()
