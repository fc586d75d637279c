"""What can be asked of a scene, in words, and what then is true at every strength."""

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
    COLOUR_OF,
    COLOURS,
    GROWTH,
    OBJECTS,
    SIZE_OF,
    SMALLEST,
    TONES,
    Attribute,
    Colour,
    Object,
    Scene,
    numbers,
    scene,
)

TRAINING_SEEDS = range(0, 1_000_000)
HELD_OUT_SEEDS = range(1_000_000, 1_010_000)
"""Seeds of tasks that no model is trained on."""

MOST_AT_ONCE = 3
STRENGTHS = (-0.5, 1.5)
"""Here every path is straight, nothing is clamped, and the objects stay at LEAST_CONTRAST."""
VISIBLE_COLOUR = 0.2
"""A full edit changes a colour by at least this RGB distance; a colour nearer to the asked one counts as it already."""
LEAST_CONTRAST = 0.15
"""RGB distance of the objects from the background that edits of both keep at all strengths: 38 of 255 in one channel,
six times a noise of 0.025."""
FACTORS = {"bigger": 1.5, "smaller": 2 / 3}
"""Sizes at strength 1, times those at 0."""

_COLOUR_WORDS = (
    "make the {0} {1}",
    "turn the {0} {1}",
    "the {0} should be {1}",
    "paint the {0} {1}",
    "change the {0} to {1}",
)
_SIZE_WORDS = {
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
    """An instruction and its truth. full: the colour at strength 1, or the size there, times that at 0."""

    instruction: str
    attribute: Attribute
    full: Colour | float

    def at(self, source: Scene, strength: float) -> Scene:
        """The scene with this edit: linear in the attribute, the source at 0, also beyond 0 and 1 while drawable."""
        value: Any
        if isinstance(self.full, float):
            size = getattr(source, self.attribute)
            value = max(size * min(1 + strength * (self.full - 1), GROWTH), SMALLEST)
        else:
            value = tuple(_colours(source, self, [strength])[0].tolist())
        return replace(source, **{self.attribute: value})


class Task(NamedTuple):
    """A scene and what is asked of it at once."""

    scene: Scene
    edits: tuple[Edit, ...]

    @property
    def prompt(self) -> str:
        return SEPARATOR.join(edit.instruction for edit in self.edits)


def task(seed: int) -> Task:
    """The task of a seed: 1 to MOST_AT_ONCE edits of a random scene."""
    chance = generator(seed, "miniature")
    source = scene(chance)
    count = 1 + int(torch.randint(MOST_AT_ONCE, (), generator=chance))
    return Task(source, edits(chance, source, count))


def edits(chance: torch.Generator, source: Scene, count: int) -> tuple[Edit, ...]:
    """Edits of different attributes, each to be seen by itself, all to be seen together, in random order.

    Raises TrainingError unless count is 1 to MOST_AT_ONCE.
    """
    if not 1 <= count <= MOST_AT_ONCE:
        raise TrainingError(f"{count} edits were asked for at once; expected 1 to {MOST_AT_ONCE}.")
    possible = _possible(source, chance)
    chosen: list[Edit] = []
    for number in torch.randperm(len(possible), generator=chance).tolist():
        if len(chosen) == count:
            break
        options = [edit for edit in possible[number] if legible(source, [*chosen, edit])]
        if options:
            chosen.append(_one_of(options, chance))
    return tuple(chosen)


def apply(source: Scene, together: Sequence[Edit], strengths: Sequence[float]) -> Scene:
    """The scene with several edits, each at its strength.

    Raises TrainingError when two of them change the same attribute, or when there are not as many strengths.
    """
    if len({edit.attribute for edit in together}) < len(together):
        raise TrainingError(f"{[edit.instruction for edit in together]} change the same thing twice; keep one of them.")
    if len(strengths) != len(together):
        raise TrainingError(f"{len(together)} edits need as many strengths; found {len(strengths)}.")
    result = source
    for edit, strength in zip(together, strengths):
        result = edit.at(result, strength)
    return result


def fits(source: Scene, edit: Edit) -> bool:
    """Whether an edit of another scene changes something to be seen in this one, at all STRENGTHS."""
    changes = isinstance(edit.full, float) or _differs(source, edit.attribute, edit.full)
    return changes and legible(source, [edit])


def legible(source: Scene, together: Sequence[Edit]) -> bool:
    """Whether both objects stand out from the background at all STRENGTHS of all these edits."""
    by_attribute = {edit.attribute: edit for edit in together}
    grounds = _path(source, "background", by_attribute.get("background"))
    paths = np.concatenate([_path(source, one, by_attribute.get(one)) for one in COLOUR_OF.values()])
    return bool(np.linalg.norm(paths[:, None] - grounds[None], axis=-1).min() >= LEAST_CONTRAST)


def _path(source: Scene, attribute: Attribute, edit: Edit | None) -> np.ndarray:
    """The colours that an attribute goes through, (n, 3)."""
    if edit is None:
        return numbers(source, attribute)[None]
    return _colours(source, edit, np.linspace(*STRENGTHS, 21))


def _colours(source: Scene, edit: Edit, strengths: Sequence[float] | np.ndarray) -> np.ndarray:
    """The edited colour at each strength, (n, 3)."""
    start = numbers(source, edit.attribute)
    return np.clip(start + np.asarray(strengths)[:, None] * (np.asarray(edit.full) - start), 0, 1)


def _possible(source: Scene, chance: torch.Generator) -> list[list[Edit]]:
    """For each attribute the edits that change something to be seen, in words drawn for each."""
    found = [list(_recolourings(source, "background", "background", TONES, chance))]
    for thing in OBJECTS:
        found.append(list(_recolourings(source, COLOUR_OF[thing], thing, COLOURS, chance)))
        found.append(list(_resizings(thing, chance)))
    return found


def _recolourings(
    source: Scene, attribute: Attribute, what: str, colours: dict[str, Colour], chance: torch.Generator
) -> Iterator[Edit]:
    for name, colour in colours.items():
        if _differs(source, attribute, colour):
            yield Edit(_one_of(_COLOUR_WORDS, chance).format(what, name), attribute, colour)


def _differs(source: Scene, attribute: Attribute, colour: Colour) -> bool:
    return bool(np.linalg.norm(numbers(source, attribute) - colour) >= VISIBLE_COLOUR)


def _resizings(thing: Object, chance: torch.Generator) -> Iterator[Edit]:
    for direction, factor in FACTORS.items():
        yield Edit(_one_of(_SIZE_WORDS[direction], chance).format(thing), SIZE_OF[thing], factor)


def _one_of(options: Sequence[Any], chance: torch.Generator) -> Any:
    return options[int(torch.randint(len(options), (), generator=chance))]
