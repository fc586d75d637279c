"""Source, edits and a picture for Stable Flow's methods on the golden model."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy.conds import CONDRegular
from comfy.model_patcher import ModelPatcher

from .model_calls import noise, velocity_of

LATENT = (1, 16, 8, 8)
ROWS = 24


def stacked_text(guidances: tuple[float, ...] = (3.5, 3.5, 3.5), rows: int = ROWS, edits_only: bool = False) -> list:
    """Source and two edits as one conditioning, as batch_prompts makes it."""
    text, pooled = noise(3, ROWS, 64, seed=1)[:, :rows], noise(3, 768, seed=2)
    first = 1 if edits_only else 0
    per_picture = {"guidance": None, "model_conds": {"guidance": CONDRegular(torch.tensor(guidances[first:]))}}
    return [[text[first:], {"pooled_output": pooled[first:], **per_picture}]]


def source_text(guidance: float = 3.5, rows: int = ROWS, **more: object) -> list:
    """The source of stacked_text alone."""
    return _one(0, guidance, rows, more)


def edit_text(k: int, guidance: float = 3.5, rows: int = ROWS, **more: object) -> list:
    """The k-th edit of stacked_text alone."""
    return _one(k, guidance, rows, more)


def _one(k: int, guidance: float, rows: int, more: dict[str, object]) -> list:
    [[text, options]] = stacked_text(rows=rows)
    return [[text[k : k + 1], {"pooled_output": options["pooled_output"][k : k + 1], "guidance": guidance, **more}]]


def sigmas_of(model: ModelPatcher, steps: int = 4, scheduler: str = "simple") -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def photo(model: ModelPatcher) -> torch.Tensor:
    """A latent as an autoencoder gives it."""
    return model.model.latent_format.process_out(0.7 * noise(*LATENT, seed=6))


def euler(model: ModelPatcher, text: list, steps: int, seed: int = 5) -> torch.Tensor:
    """Euler steps written out, from the noise of a seed."""
    z, sigmas = comfy.sample.prepare_noise(torch.zeros(LATENT), seed), sigmas_of(model, steps)
    for k in range(steps):
        z = z + (sigmas[k + 1] - sigmas[k]) * velocity_of(model, z, sigmas[k].item(), text)
    return model.model.latent_format.process_out(z)
