"""Conditionings of a source and its edits, and a source latent, for Stable Flow's methods on the golden model."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy.conds import CONDRegular
from comfy.model_patcher import ModelPatcher

from .model_calls import noise, velocity_of

LATENT = (1, 16, 8, 8)
TEXT_TOKENS = 24


def batched_text(
    guidances: tuple[float, ...] = (3.5, 3.5, 3.5), num_tokens: int = TEXT_TOKENS, edits_only: bool = False
) -> list:
    """Source and two edits in one conditioning with a batch of prompts, as batch_prompts returns it."""
    text, pooled = noise(3, TEXT_TOKENS, 64, seed=1)[:, :num_tokens], noise(3, 768, seed=2)
    start = 1 if edits_only else 0
    per_image = {"guidance": None, "model_conds": {"guidance": CONDRegular(torch.tensor(guidances[start:]))}}
    return [[text[start:], {"pooled_output": pooled[start:], **per_image}]]


def source_text(guidance: float = 3.5, num_tokens: int = TEXT_TOKENS, **more: object) -> list:
    """The source of batched_text alone."""
    return _text(0, guidance, num_tokens, more)


def edit_text(k: int, guidance: float = 3.5, num_tokens: int = TEXT_TOKENS, **more: object) -> list:
    """The k-th edit of batched_text alone."""
    return _text(k, guidance, num_tokens, more)


def _text(k: int, guidance: float, num_tokens: int, more: dict[str, object]) -> list:
    [[text, options]] = batched_text(num_tokens=num_tokens)
    return [[text[k : k + 1], {"pooled_output": options["pooled_output"][k : k + 1], "guidance": guidance, **more}]]


def sigmas_of(model: ModelPatcher, steps: int = 4, scheduler: str = "simple") -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def photo(model: ModelPatcher) -> torch.Tensor:
    """A source latent (1, 16, 8, 8) in the scale of the VAE's output."""
    return model.model.latent_format.process_out(0.7 * noise(*LATENT, seed=6))


def euler(model: ModelPatcher, text: list, steps: int, seed: int = 5) -> torch.Tensor:
    """Euler sampling written out, from the noise of a seed."""
    z, sigmas = comfy.sample.prepare_noise(torch.zeros(LATENT), seed), sigmas_of(model, steps)
    for k in range(steps):
        z = z + (sigmas[k + 1] - sigmas[k]) * velocity_of(model, z, sigmas[k].item(), text)
    return model.model.latent_format.process_out(z)
