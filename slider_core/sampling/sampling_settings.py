"""Sampling as KSampler does it."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

from ..types import Conditioning, OnStep


@dataclass(frozen=True)
class SamplingSettings:
    """KSampler's inputs of the same names; sampler: its sampler_name."""

    steps: int
    seed: int
    sampler: str = "euler"
    scheduler: str = "simple"

    def sample(
        self,
        model: ModelPatcher,
        conditioning: Conditioning,
        latent: torch.Tensor,
        noise: torch.Tensor,
        on_step: OnStep | None = None,
    ) -> torch.Tensor:
        """Sample at cfg 1 and denoise 1, with a given noise.

        latent, noise and the result: (batch, channels, height, width).
        """
        return comfy.sample.sample(
            model,
            noise,
            self.steps,
            1.0,
            self.sampler,
            self.scheduler,
            conditioning,
            conditioning,
            latent,
            callback=on_step,
            disable_pbar=True,
            seed=self.seed,
        )
