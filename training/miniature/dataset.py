"""What adapters for the miniature model learn from, in the trainer's own layouts: scenes with instructions for PPS and
SPPS, the world's true paths from source to edit for the projector."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch

from slider_core.text.instructions import SEPARATOR

from ..edit_strips import INNER, stacked
from ..rng import generator
from .edits import MOST_AT_ONCE, TRAINING_SEEDS, apply, edits
from .synthetic_scenes import picture_of, scene

SCENES = 400
STACKS = 600
_MOST_IN_A_STACK = 2
FIRST_SEED = TRAINING_SEEDS[-1] - 10_000


def write_lessons(folder: Path, scenes: int = SCENES, stacks: int = STACKS) -> None:
    """Write scenes/ with tasks.jsonl, and stacks/."""
    _write_tasks(folder / "scenes", scenes)
    _write_stacks(folder / "stacks", stacks)


def _write_tasks(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(count):
        chance = generator(FIRST_SEED + k, "tasks")
        source = scene(chance)
        picture_of(source).save(folder / f"{k:04}.png")
        for _ in range(3):
            asked = edits(chance, source, _up_to(MOST_AT_ONCE, chance))
            lines.append({"image": f"{k:04}.png", "instructions": [edit.instruction for edit in asked]})
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def _write_stacks(folder: Path, count: int) -> None:
    """The true paths need no sorting out: their strengths are known, and so even."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        chance = generator(FIRST_SEED + k, "stacks")
        source = scene(chance)
        asked = edits(chance, source, _up_to(_MOST_IN_A_STACK, chance))
        strengths = [0.0, *torch.linspace(0, 1, INNER).tolist(), 1.0]
        row = stacked([picture_of(apply(source, asked, [strength] * len(asked))) for strength in strengths])
        row.save(folder / f"{k:04}.png")
        record = {
            "image_name": f"{k:04}.png",
            "edit_instruction": SEPARATOR.join(edit.instruction for edit in asked),
            "category": "attribute_change",
            "lpips_kontext_edit": 1.0,
            "lpips_edit_inversion": 0.0,
            "lpips_sequence": [b - a for a, b in pairwise(strengths)],
        }
        (folder / f"{k:04}.json").write_text(json.dumps(record), encoding="utf-8")


def _up_to(most: int, chance: torch.Generator) -> int:
    return 1 + int(torch.randint(most, (), generator=chance))
