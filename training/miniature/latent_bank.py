"""What the transformer learns from: the world's tasks as latents, made once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import max_pool2d

from slider_core.atomic_write import atomic_write

from ..rng import generator
from .autoencoder import Autoencoder, as_pixels
from .edits import MOST_AT_ONCE, TRAINING_SEEDS, Edit, apply, edits
from .synthetic_scenes import OBJECTS, Scene, coverage, scene

TASKS_OF_A_SCENE = 4
_SCENES_IN_A_FILE = 250


class Samples(NamedTuple):
    """sources, targets: latents (n, 16, 8, 8). objects: where either has an object, (n, 1, 8, 8). instructions: n."""

    sources: Tensor
    targets: Tensor
    objects: Tensor
    instructions: Sequence[tuple[str, ...]]


def training_samples(folder: Path, autoencoder: Autoencoder, files: int) -> Samples:
    """From so many files of 1000 samples each, made first where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_file(folder / f"{k:04}.safetensors", autoencoder, k) for k in range(files)]
    return Samples(
        torch.cat([part.sources for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.objects for part in parts]),
        [one for part in parts for one in part.instructions],
    )


def samples_of(autoencoder: Autoencoder, tasks: Sequence[tuple[Scene, Sequence[Edit]]]) -> Samples:
    """The latents of tasks, with every edit whole."""
    scenes = [(source, apply(source, asked, [1.0] * len(asked))) for source, asked in tasks]
    different = list(dict.fromkeys(one for pair in scenes for one in pair))
    latents = dict(zip(different, autoencoder.encoded(torch.stack(list(map(as_pixels, different)))).half()))
    return Samples(
        torch.stack([latents[source] for source, _ in scenes]),
        torch.stack([latents[target] for _, target in scenes]),
        torch.stack([_places(source) | _places(target) for source, target in scenes]),
        [tuple(edit.instruction for edit in asked) for _, asked in tasks],
    )


def _places(one: Scene) -> Tensor:
    """(1, 8, 8)"""
    covered = sum(coverage(one, thing) for thing in OBJECTS)
    return max_pool2d(torch.from_numpy(np.asarray(covered))[None].float(), 8) > 0


def _file(file: Path, autoencoder: Autoencoder, number: int) -> Samples:
    if not file.is_file():
        seeds = TRAINING_SEEDS[number * _SCENES_IN_A_FILE : (number + 1) * _SCENES_IN_A_FILE]
        made = samples_of(autoencoder, [task for seed in seeds for task in _tasks(seed)])
        tensors = {"sources": made.sources, "targets": made.targets, "objects": made.objects}
        atomic_write(file, save(tensors, {"instructions": json.dumps(made.instructions)}))
    with safe_open(file, "pt") as opened:
        sources, targets, objects = (opened.get_tensor(name) for name in ("sources", "targets", "objects"))
        return Samples(sources, targets, objects, list(map(tuple, json.loads(opened.metadata()["instructions"]))))


def _tasks(seed: int) -> list[tuple[Scene, Sequence[Edit]]]:
    chance = generator(seed, "bank")
    source = scene(chance)
    counts = (1 + torch.randint(MOST_AT_ONCE, (TASKS_OF_A_SCENE,), generator=chance)).tolist()
    return [(source, edits(chance, source, count)) for count in counts]
