"""Scenes of a circle and a square, as numbers and as pictures. Lengths are pixels, colours RGB from 0 to 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..examples import as_picture

Colour = tuple[float, float, float]
Point = tuple[float, float]
Object = Literal["circle", "square"]
Attribute = Literal["circle_colour", "square_colour", "background", "circle_size", "square_size"]

SIDE = 64
OBJECTS: tuple[Object, ...] = ("circle", "square")
COLOUR_OF: dict[Object, Attribute] = {"circle": "circle_colour", "square": "square_colour"}
SIZE_OF: dict[Object, Attribute] = {"circle": "circle_size", "square": "square_size"}
SIZES = (6.0, 8.0)
SMALLEST = 2.0
"""No edit makes an object smaller: what is less cannot be told from noise by its colour."""
GROWTH = 1.75
"""No edit makes an object larger than this, times its size; every scene has room for both objects grown so."""
APART = 2.0
"""Between the grown objects, and between them and the frame, there is at least this."""

# Channels stay in 0.25 to 0.75, so that a path between two colours is straight from strength -0.5 to 1.5: 0.27 and 0.73
# with their jitter reach 0.01 and 0.99 there.
COLOURS: dict[str, Colour] = {
    "red": (0.73, 0.27, 0.27),
    "green": (0.27, 0.73, 0.27),
    "blue": (0.27, 0.27, 0.73),
    "yellow": (0.73, 0.73, 0.27),
    "pink": (0.73, 0.27, 0.73),
    "cyan": (0.27, 0.73, 0.73),
}
TONES: dict[str, Colour] = {
    "dark": (0.27, 0.27, 0.27),
    "gray": (0.50, 0.50, 0.50),
    "bright": (0.73, 0.73, 0.73),
    "brown": (0.48, 0.39, 0.29),
}
JITTER = 0.02
"""Most that a channel of a scene's colours is off the named one."""


@dataclass(frozen=True)
class Looks:
    """All that edits change. A circle's size is its radius, a square's half its side."""

    circle_colour: Colour
    square_colour: Colour
    background: Colour
    circle_size: float
    square_size: float


@dataclass(frozen=True)
class Scene(Looks):
    """A picture as numbers. Centres are (x, y) from the upper left corner; pixel k spans k to k + 1."""

    circle_centre: Point
    square_centre: Point


def numbers(looks: Looks, attribute: Attribute) -> np.ndarray:
    """An attribute as (3,) or, for a size, (1,)."""
    return np.atleast_1d(np.asarray(getattr(looks, attribute), np.float64))


def centre_of(scene: Scene, thing: Object) -> Point:
    return scene.circle_centre if thing == "circle" else scene.square_centre


def away(scene: Scene, thing: Object) -> tuple[np.ndarray, np.ndarray]:
    """How far the middle of each pixel is from an object's centre, across and down, each (SIDE, SIDE), none below 0."""
    x, y = centre_of(scene, thing)
    down, across = np.indices((SIDE, SIDE)) + 0.5
    return np.abs(across - x), np.abs(down - y)


def edge_at(scene: Scene, thing: Object) -> np.ndarray:
    """The size at which an object's edge comes to the middle of each pixel, (SIDE, SIDE)."""
    across, down = away(scene, thing)
    return np.hypot(across, down) if thing == "circle" else np.maximum(across, down)


def covered(thing: Object, across: np.ndarray, down: np.ndarray, size: float | np.ndarray) -> np.ndarray:
    """How much of the pixels so far away an object of a size covers, 0 to 1; sizes are broadcast.

    A square's is exact; a circle's edge is taken as straight within a pixel and square to the radius.
    """
    if thing == "circle":
        return np.clip(size + 0.5 - np.hypot(across, down), 0, 1)
    return np.clip(size + 0.5 - across, 0, 1) * np.clip(size + 0.5 - down, 0, 1)


def coverage(scene: Scene, thing: Object) -> np.ndarray:
    """How much of each pixel an object covers, 0 to 1, (SIDE, SIDE)."""
    return covered(thing, *away(scene, thing), getattr(scene, SIZE_OF[thing]))


def drawn(scene: Scene) -> np.ndarray:
    """The picture, float32 (SIDE, SIDE, 3), with smooth edges."""
    picture = np.broadcast_to(numbers(scene, "background"), (SIDE, SIDE, 3))
    for thing in OBJECTS:
        picture = picture + coverage(scene, thing)[..., None] * (numbers(scene, COLOUR_OF[thing]) - picture)
    return picture.astype(np.float32)


def picture_of(scene: Scene) -> Image.Image:
    return as_picture(torch.from_numpy(drawn(scene)))


def gap(scene: Scene, growth: float = 1.0) -> float:
    """The least space between the objects and to the frame, both grown so many times; below 0 they touch."""
    to_frame = min(
        min(place, SIDE - place) - getattr(scene, SIZE_OF[thing]) * growth
        for thing in OBJECTS
        for place in centre_of(scene, thing)
    )
    beyond = [
        max(abs(one - other) - scene.square_size * growth, 0)
        for one, other in zip(scene.circle_centre, scene.square_centre)
    ]
    return min(to_frame, math.hypot(*beyond) - scene.circle_size * growth)


def scene(chance: torch.Generator) -> Scene:
    """A random scene that has room for both objects grown."""
    circle, square = torch.randperm(len(COLOURS), generator=chance)[:2].tolist()
    tone = int(torch.randint(len(TONES), (), generator=chance))
    colours, tones = list(COLOURS.values()), list(TONES.values())
    circle_size, square_size = (_between(*SIZES, chance) for _ in OBJECTS)
    looks = {
        "circle_colour": _jittered(colours[circle], chance),
        "square_colour": _jittered(colours[square], chance),
        "background": _jittered(tones[tone], chance),
    }
    while True:
        found = Scene(
            **looks,
            circle_size=circle_size,
            square_size=square_size,
            circle_centre=_place(circle_size, chance),
            square_centre=_place(square_size, chance),
        )
        if gap(found, GROWTH) >= APART:
            return found


def _place(size: float, chance: torch.Generator) -> Point:
    least = size * GROWTH + APART
    x, y = (_between(least, SIDE - least, chance) for _ in range(2))
    return x, y


def _jittered(colour: Colour, chance: torch.Generator) -> Colour:
    red, green, blue = (channel + _between(-JITTER, JITTER, chance) for channel in colour)
    return red, green, blue


def _between(least: float, most: float, chance: torch.Generator) -> float:
    return least + (most - least) * torch.rand((), generator=chance, dtype=torch.float64).item()
