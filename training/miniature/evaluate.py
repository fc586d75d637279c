"""Evaluates the miniature model on validation scenes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from slider_core.text.instructions import SEPARATOR

from ..frozen_model import FrozenModel
from ..rng import generator
from .autoencoder import Autoencoder, scene_to_tensor
from .edits import VALIDATION_SEEDS, Edit, apply_edits, random_edits
from .read_attributes import deviations, read_attributes, within_tolerance
from .synthetic_scenes import Scene, random_scene
from .text_encoders import TextEncoders

STEPS = 8
GUIDANCE = 3.5
NUM_TEXT_TOKENS = 32
_BATCH = 32

Tasks = Sequence[tuple[Scene, Sequence[Edit]]]


class Evaluation(NamedTuple):
    """Success of edits at strength 1, measured in the images.

    success_rate: fraction of the tasks after which every attribute is within its tolerance; for all tasks, and by the
    edited attribute. error_rate: for each attribute, fraction of the tasks after which it is not within its tolerance,
    separately for tasks that edit it and tasks that do not.
    """

    success_rate: dict[str, float]
    error_rate: dict[str, float]


def validation_tasks(count: int, num_edits: int) -> Tasks:
    """Scenes that no model is trained on, with edits; the same in every call."""
    tasks = []
    for seed in VALIDATION_SEEDS[:count]:
        rng = generator(seed, "examination", num_edits)
        source = random_scene(rng)
        tasks.append((source, random_edits(rng, source, num_edits)))
    return tasks


def evaluate_images(images: np.ndarray, tasks: Tasks) -> Evaluation:
    """images: the edited image of each task, (tasks, SIDE, SIDE, 3)."""
    successes, errors = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for image, (source, edits) in zip(images, tasks):
        expected = apply_edits(source, edits, [1.0] * len(edits))
        measured = read_attributes(image, source)
        edited = {edit.attribute for edit in edits}
        for name in {"all", edits[0].attribute if len(edits) == 1 else "several"}:
            successes[name].append(within_tolerance(expected, measured))
        for attribute, deviation in deviations(expected, measured).items():
            errors[f"{attribute}, {'edited' if attribute in edited else 'not edited'}"].append(deviation > 1)
    return Evaluation(_means(successes), _means(errors))


def _means(groups: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in sorted(groups.items())}


@torch.no_grad()
def render_tasks(
    model: FrozenModel, encoders: TextEncoders, autoencoder: Autoencoder, tasks: Tasks, steps: int = STEPS
) -> np.ndarray:
    """Edit the scenes with the Euler sampler and ComfyUI's simple schedule: (tasks, SIDE, SIDE, 3)."""
    sigmas = comfy.samplers.calculate_sigmas(model.patcher.model.model_sampling, "simple", steps)
    images = [
        autoencoder.decoder(_sample(model, encoders, autoencoder, tasks[k : k + _BATCH], sigmas, k))
        for k in range(0, len(tasks), _BATCH)
    ]
    return torch.cat(images).permute(0, 2, 3, 1).clamp(0, 1).numpy()


def _sample(
    model: FrozenModel, encoders: TextEncoders, autoencoder: Autoencoder, tasks: Tasks, sigmas: Tensor, first: int
) -> Tensor:
    """The latents of edited tasks. first: index of the first task, the key of the noise."""
    sources = autoencoder.encode(torch.stack([scene_to_tensor(source) for source, _ in tasks]))
    prompts = [SEPARATOR.join(edit.instruction for edit in edits) for _, edits in tasks]
    text = encoders.encode(prompts, NUM_TEXT_TOKENS)
    latent = torch.randn(sources.shape, generator=generator("examination", first))
    for sigma, next_sigma in pairwise(sigmas):
        velocity = model.velocity(latent, sigma.expand(len(tasks)), text, GUIDANCE, [sources])
        latent = latent + (next_sigma - sigma) * velocity
    return latent
