"""Training samples of the transformer: random tasks as latents, computed once and kept on disk."""

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
from .autoencoder import Autoencoder, scene_to_tensor
from .edits import MAX_EDITS, TRAINING_SEEDS, Edit, apply_edits, random_edits
from .synthetic_scenes import OBJECTS, Scene, coverage, random_scene

TASKS_PER_SCENE = 4
_SCENES_PER_FILE = 250


class LatentSamples(NamedTuple):
    """Edits at strength 1.

    sources, targets: latents, (n, 16, 8, 8). objects: cells with an object in source or target, (n, 1, 8, 8), bool.
    instructions: one tuple per sample.
    """

    sources: Tensor
    targets: Tensor
    objects: Tensor
    instructions: Sequence[tuple[str, ...]]


def load_training_samples(folder: Path, autoencoder: Autoencoder, num_files: int) -> LatentSamples:
    """Load `num_files` files of 1000 samples each; missing files are computed and written first."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [_load_file(folder / f"{k:04}.safetensors", autoencoder, k) for k in range(num_files)]
    return LatentSamples(
        torch.cat([samples.sources for samples in files]),
        torch.cat([samples.targets for samples in files]),
        torch.cat([samples.objects for samples in files]),
        [instructions for samples in files for instructions in samples.instructions],
    )


def encode_tasks(autoencoder: Autoencoder, tasks: Sequence[tuple[Scene, Sequence[Edit]]]) -> LatentSamples:
    """The latents of tasks, with every edit at strength 1."""
    pairs = [(source, apply_edits(source, edits, [1.0] * len(edits))) for source, edits in tasks]
    unique = list(dict.fromkeys(scene for pair in pairs for scene in pair))
    latents = dict(zip(unique, autoencoder.encode(torch.stack(list(map(scene_to_tensor, unique)))).half()))
    return LatentSamples(
        torch.stack([latents[source] for source, _ in pairs]),
        torch.stack([latents[target] for _, target in pairs]),
        torch.stack([_object_cells(source) | _object_cells(target) for source, target in pairs]),
        [tuple(edit.instruction for edit in edits) for _, edits in tasks],
    )


def _object_cells(scene: Scene) -> Tensor:
    """The latent cells that an object covers in part, (1, 8, 8), bool."""
    covered = sum(coverage(scene, name) for name in OBJECTS)
    return max_pool2d(torch.from_numpy(np.asarray(covered))[None].float(), 8) > 0


def _load_file(file: Path, autoencoder: Autoencoder, index: int) -> LatentSamples:
    if not file.is_file():
        seeds = TRAINING_SEEDS[index * _SCENES_PER_FILE : (index + 1) * _SCENES_PER_FILE]
        samples = encode_tasks(autoencoder, [task for seed in seeds for task in _random_tasks(seed)])
        tensors = {"sources": samples.sources, "targets": samples.targets, "objects": samples.objects}
        atomic_write(file, save(tensors, {"instructions": json.dumps(samples.instructions)}))
    with safe_open(file, "pt") as content:
        sources, targets, objects = (content.get_tensor(name) for name in ("sources", "targets", "objects"))
        instructions = json.loads(content.metadata()["instructions"])
        return LatentSamples(sources, targets, objects, list(map(tuple, instructions)))


def _random_tasks(seed: int) -> list[tuple[Scene, Sequence[Edit]]]:
    rng = generator(seed, "bank")
    source = random_scene(rng)
    counts = (1 + torch.randint(MAX_EDITS, (TASKS_PER_SCENE,), generator=rng)).tolist()
    return [(source, random_edits(rng, source, count)) for count in counts]
