"""How well the miniature model does what it is told, on scenes that it has never seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from slider_core.text.instructions import SEPARATOR

from ..frozen_model import BaseModel
from ..rng import generator
from .autoencoder import Autoencoder, as_pixels
from .edits import HELD_OUT_SEEDS, Edit, apply, edits
from .read_attributes import as_wanted, deviations, measured
from .synthetic_scenes import Scene, scene
from .text_encoders import TextEncoders

STEPS = 8
GUIDANCE = 3.5
ROWS = 32
_AT_ONCE = 32

Tasks = Sequence[tuple[Scene, Sequence[Edit]]]


class Examined(NamedTuple):
    """right: share of the tasks after which every attribute is within tolerance, by what was asked.

    wrong: how often each attribute is not, of all tasks, by whether it was asked to change.
    """

    right: dict[str, float]
    wrong: dict[str, float]


def held_out_tasks(count: int, edits_each: int) -> Tasks:
    """The same every time."""
    found = []
    for seed in HELD_OUT_SEEDS[:count]:
        chance = generator(seed, "examination", edits_each)
        source = scene(chance)
        found.append((source, edits(chance, source, edits_each)))
    return found


def examined(pictures: np.ndarray, tasks: Tasks) -> Examined:
    """pictures: what came of the tasks, (tasks, SIDE, SIDE, 3)."""
    right, wrong = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for picture, (source, asked) in zip(pictures, tasks):
        true = apply(source, asked, [1.0] * len(asked))
        found = measured(picture, source)
        what = asked[0].attribute if len(asked) == 1 else "several"
        for name in {"all", what}:
            right[name].append(as_wanted(true, found))
        for attribute, far in deviations(true, found).items():
            about = "asked" if attribute in {edit.attribute for edit in asked} else "not asked"
            wrong[f"{attribute}, {about}"].append(far > 1)
    return Examined(
        *({name: float(np.mean(values)) for name, values in sorted(part.items())} for part in (right, wrong))
    )


@torch.no_grad()
def rendered(
    base: BaseModel, encoders: TextEncoders, autoencoder: Autoencoder, tasks: Tasks, steps: int = STEPS
) -> np.ndarray:
    """Sampled by Euler's method over ComfyUI's noise levels, (tasks, SIDE, SIDE, 3)."""
    sigmas = comfy.samplers.calculate_sigmas(base.patcher.model.model_sampling, "simple", steps)
    made = [
        autoencoder.decoder(_sampled(base, encoders, autoencoder, tasks[k : k + _AT_ONCE], sigmas, k))
        for k in range(0, len(tasks), _AT_ONCE)
    ]
    return torch.cat(made).permute(0, 2, 3, 1).clamp(0, 1).numpy()


def _sampled(
    base: BaseModel, encoders: TextEncoders, autoencoder: Autoencoder, tasks: Tasks, sigmas: Tensor, number: int
) -> Tensor:
    sources = autoencoder.encoded(torch.stack([as_pixels(source) for source, _ in tasks]))
    text = encoders.encoded([SEPARATOR.join(edit.instruction for edit in asked) for _, asked in tasks], ROWS)
    latent = torch.randn(sources.shape, generator=generator("examination", number))
    for now, after in pairwise(sigmas):
        velocity = base.velocity(latent, now.expand(len(tasks)), text, GUIDANCE, [sources])
        latent = latent + (after - now) * velocity
    return latent
