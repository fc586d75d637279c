"""Edits of synthetic scenes: instructions, and the exact scene at every strength."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from slider_core.text.instructions import SEPARATOR

from ..errors import TrainingError
from ..rng import generator
from .synthetic_scenes import (
    COLOR_OF,
    COLORS,
    MAX_GROWTH,
    MIN_SIZE,
    OBJECTS,
    SIZE_OF,
    TONES,
    Attribute,
    Color,
    ObjectName,
    Scene,
    attribute_values,
    random_scene,
)

TRAINING_SEEDS = range(0, 1_000_000)
VALIDATION_SEEDS = range(1_000_000, 1_010_000)
"""Seeds of scenes and tasks that no model is trained on."""

MAX_EDITS = 3
STRENGTHS = (-0.5, 1.5)
"""Within these strengths edits are linear without clipping, and objects keep MIN_CONTRAST."""
MIN_COLOR_CHANGE = 0.2
"""Minimum RGB distance that an edit changes a color by at strength 1."""
MIN_CONTRAST = 0.15
"""Minimum RGB distance between objects and background at all strengths: 38 of 255 in one channel, six times a noise of
0.025."""
SIZE_FACTORS = {"bigger": 1.5, "smaller": 2 / 3}
"""Size at strength 1, relative to the source."""

_COLOR_PHRASES = (
    "make the {0} {1}",
    "turn the {0} {1}",
    "the {0} should be {1}",
    "paint the {0} {1}",
    "change the {0} to {1}",
)
_SIZE_PHRASES = {
    "bigger": (
        "make the {0} bigger",
        "make the {0} larger",
        "the {0} should be bigger",
        "let the {0} grow",
        "enlarge the {0}",
    ),
    "smaller": (
        "make the {0} smaller",
        "let the {0} shrink",
        "the {0} should be smaller",
        "shrink the {0}",
        "reduce the {0}",
    ),
}


@dataclass(frozen=True)
class Edit:
    """full: the color at strength 1, or the size at strength 1 relative to the source."""

    instruction: str
    attribute: Attribute
    full: Color | float

    def at(self, source: Scene, strength: float) -> Scene:
        """The scene at a strength: the attribute changes linearly, below 0 and above 1 too, within its valid range."""
        value: Any
        if isinstance(self.full, float):
            size = getattr(source, self.attribute)
            value = max(size * min(1 + strength * (self.full - 1), MAX_GROWTH), MIN_SIZE)
        else:
            value = tuple(_edited_colors(source, self, [strength])[0].tolist())
        return replace(source, **{self.attribute: value})


class Task(NamedTuple):
    """A scene and the edits of one prompt."""

    scene: Scene
    edits: tuple[Edit, ...]

    @property
    def prompt(self) -> str:
        return SEPARATOR.join(edit.instruction for edit in self.edits)


def random_task(seed: int) -> Task:
    """1 to MAX_EDITS edits of a random scene."""
    rng = generator(seed, "miniature")
    source = random_scene(rng)
    count = 1 + int(torch.randint(MAX_EDITS, (), generator=rng))
    return Task(source, random_edits(rng, source, count))


def random_edits(rng: torch.Generator, source: Scene, count: int) -> tuple[Edit, ...]:
    """Edits of different attributes, in random order, that are visible by themselves and together.

    Raises TrainingError unless count is 1 to MAX_EDITS.
    """
    if not 1 <= count <= MAX_EDITS:
        raise TrainingError(f"The number of edits is {count}; expected 1 to {MAX_EDITS}.")
    possible = _possible_edits(source, rng)
    chosen: list[Edit] = []
    for index in torch.randperm(len(possible), generator=rng).tolist():
        if len(chosen) == count:
            break
        options = [edit for edit in possible[index] if is_legible(source, [*chosen, edit])]
        if options:
            chosen.append(_choose(options, rng))
    return tuple(chosen)


def apply_edits(source: Scene, edits: Sequence[Edit], strengths: Sequence[float]) -> Scene:
    """The scene with several edits, each at its strength.

    Raises TrainingError when two edits change the same attribute, or when the number of strengths differs.
    """
    if len({edit.attribute for edit in edits}) < len(edits):
        raise TrainingError(
            f"{[edit.instruction for edit in edits]} change the same attribute twice; remove one of them."
        )
    if len(strengths) != len(edits):
        raise TrainingError(f"Expected {len(edits)} strengths, one per edit; found {len(strengths)}.")
    result = source
    for edit, strength in zip(edits, strengths):
        result = edit.at(result, strength)
    return result


def edit_fits(source: Scene, edit: Edit) -> bool:
    """Whether an edit of another scene is visible in this one and keeps MIN_CONTRAST at all STRENGTHS."""
    changes = isinstance(edit.full, float) or _is_visible_change(source, edit.attribute, edit.full)
    return changes and is_legible(source, [edit])


def is_legible(source: Scene, edits: Sequence[Edit]) -> bool:
    """Whether both objects keep MIN_CONTRAST to the background at all combinations of STRENGTHS of the edits."""
    by_attribute = {edit.attribute: edit for edit in edits}
    backgrounds = _color_path(source, "background", by_attribute.get("background"))
    paths = np.concatenate([_color_path(source, name, by_attribute.get(name)) for name in COLOR_OF.values()])
    return bool(np.linalg.norm(paths[:, None] - backgrounds[None], axis=-1).min() >= MIN_CONTRAST)


def _color_path(source: Scene, attribute: Attribute, edit: Edit | None) -> np.ndarray:
    """The colors of an attribute over STRENGTHS, (n, 3)."""
    if edit is None:
        return attribute_values(source, attribute)[None]
    return _edited_colors(source, edit, np.linspace(*STRENGTHS, 21))


def _edited_colors(source: Scene, edit: Edit, strengths: Sequence[float] | np.ndarray) -> np.ndarray:
    """The edited color at each strength, (n, 3)."""
    start = attribute_values(source, edit.attribute)
    return np.clip(start + np.asarray(strengths)[:, None] * (np.asarray(edit.full) - start), 0, 1)


def _possible_edits(source: Scene, rng: torch.Generator) -> list[list[Edit]]:
    """Lists of the visible edits of each attribute, with randomly phrased instructions."""
    edits = [list(_color_edits(source, "background", "background", TONES, rng))]
    for name in OBJECTS:
        edits.append(list(_color_edits(source, COLOR_OF[name], name, COLORS, rng)))
        edits.append(list(_size_edits(name, rng)))
    return edits


def _color_edits(
    source: Scene, attribute: Attribute, subject: str, colors: dict[str, Color], rng: torch.Generator
) -> Iterator[Edit]:
    for name, color in colors.items():
        if _is_visible_change(source, attribute, color):
            yield Edit(_choose(_COLOR_PHRASES, rng).format(subject, name), attribute, color)


def _is_visible_change(source: Scene, attribute: Attribute, color: Color) -> bool:
    return bool(np.linalg.norm(attribute_values(source, attribute) - color) >= MIN_COLOR_CHANGE)


def _size_edits(name: ObjectName, rng: torch.Generator) -> Iterator[Edit]:
    for direction, factor in SIZE_FACTORS.items():
        yield Edit(_choose(_SIZE_PHRASES[direction], rng).format(name), SIZE_OF[name], factor)


def _choose(options: Sequence[Any], rng: torch.Generator) -> Any:
    return options[int(torch.randint(len(options), (), generator=rng))]
