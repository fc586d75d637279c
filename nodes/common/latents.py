"""Latents as sampler nodes take them."""

from __future__ import annotations

from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher


def prepare_latent(model: ModelPatcher, latent: dict[str, Any]) -> torch.Tensor:
    """The samples of a latent; an empty one is converted to the model's channels and scale, as KSampler does."""
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))


def noise_for(model: ModelPatcher, latent: dict[str, Any], seed: int) -> torch.Tensor:
    """The noise that KSampler would start from."""
    return comfy.sample.prepare_noise(prepare_latent(model, latent), seed, latent.get("batch_index"))
