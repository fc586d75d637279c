"""Training data for the miniature's adapters, in the trainer's formats: scenes with instructions for PPS and SPPS, and
edit strips with the exact edits at all strengths for the projector."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch

from slider_core.text.instructions import SEPARATOR

from ..edit_strips import NUM_STRENGTHS, make_strip
from ..rng import generator
from .edits import MAX_EDITS, TRAINING_SEEDS, apply_edits, random_edits
from .synthetic_scenes import random_scene, scene_image

NUM_SCENES = 400
NUM_STRIPS = 600
_MAX_EDITS_PER_STRIP = 2
FIRST_SEED = TRAINING_SEEDS[-1] - 10_000


def write_dataset(folder: Path, num_scenes: int = NUM_SCENES, num_strips: int = NUM_STRIPS) -> None:
    """Write scenes/ with tasks.jsonl, and edit_strips/."""
    _write_scenes(folder / "scenes", num_scenes)
    _write_strips(folder / "edit_strips", num_strips)


def _write_scenes(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(count):
        rng = generator(FIRST_SEED + k, "tasks")
        source = random_scene(rng)
        scene_image(source).save(folder / f"{k:04}.png")
        for _ in range(3):
            edits = random_edits(rng, source, _random_count(MAX_EDITS, rng))
            lines.append({"image": f"{k:04}.png", "instructions": [edit.instruction for edit in edits]})
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def _write_strips(folder: Path, count: int) -> None:
    """The strengths of the columns are exact and evenly spaced, so the records contain ideal distances."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        rng = generator(FIRST_SEED + k, "stacks")
        source = random_scene(rng)
        edits = random_edits(rng, source, _random_count(_MAX_EDITS_PER_STRIP, rng))
        strengths = [0.0, *torch.linspace(0, 1, NUM_STRENGTHS).tolist(), 1.0]
        columns = [scene_image(apply_edits(source, edits, [strength] * len(edits))) for strength in strengths]
        make_strip(columns).save(folder / f"{k:04}.png")
        record = {
            "image_name": f"{k:04}.png",
            "edit_instruction": SEPARATOR.join(edit.instruction for edit in edits),
            "category": "attribute_change",
            "lpips_kontext_edit": 1.0,
            "lpips_edit_inversion": 0.0,
            "lpips_sequence": [b - a for a, b in pairwise(strengths)],
        }
        (folder / f"{k:04}.json").write_text(json.dumps(record), encoding="utf-8")


def _random_count(maximum: int, rng: torch.Generator) -> int:
    """Uniform in 1 to maximum."""
    return 1 + int(torch.randint(maximum, (), generator=rng))
