"""Checks, sigmas and sampling loops shared by the pack's own samplers, for flow matching models.

Flow matching: x = (1 - sigma) * image + sigma * noise; the model predicts the velocity noise - image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST
from comfy.samplers import CFGGuider, Sampler, calculate_sigmas

from ..errors import SliderError
from ..types import Conditioning, OnStep

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents, noise level) -> what the model predicts the picture to be."""


class StepSampler(Sampler):
    """What the samplers of this pack have in common."""

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: OnStep | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: object = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return model_wrap(x, sigma.expand(len(x)), **extra_args)

        return self.sample_loop(denoise, sigmas, latent_image, callback or (lambda *_: None))

    def sample_loop(
        self, denoise: Denoise, sigmas: torch.Tensor, latent: torch.Tensor, on_step: OnStep
    ) -> torch.Tensor:
        """Go from the first noise level to the last; the latents there."""
        raise NotImplementedError


def scheduler_sigmas(model: ModelPatcher, scheduler: str, steps: int, start: float = 0.0) -> torch.Tensor:
    """The noise levels of a scheduler from this share of the schedule on, 0 to 1, falling to 0.

    Raises SliderError when no step is left.
    """
    sampling = model.get_model_object("model_sampling")
    sigmas = calculate_sigmas(sampling, scheduler, steps)
    if start > 0:
        sigmas = sigmas[sigmas <= sampling.percent_to_sigma(start)]
    if len(sigmas) < 2:
        raise SliderError(
            f"start {start:g} leaves none of the {steps} step(s) of {scheduler!r}; expected at least one. Give it more "
            "steps or an earlier start."
        )
    return sigmas


def check_sigmas(sigmas: torch.Tensor) -> None:
    """Raise SliderError unless these noise levels fall from at most 1 to 0, as those of flow matching do."""
    falling = sigmas.ndim == 1 and len(sigmas) >= 2 and bool((sigmas.diff() < 0).all())
    if not falling or not 0 < sigmas[0] <= 1 or sigmas[-1] != 0:
        shown = ", ".join(f"{value:g}" for value in sigmas.flatten()[:4].tolist())
        raise SliderError(
            f"The noise levels (sigmas) begin with {shown}; expected at least two that fall from at most 1 to 0, as "
            "those of a flow matching model do. Use a BasicScheduler with this model and denoise 1."
        )


def check_flow_matching(model: ModelPatcher) -> None:
    """Raise SliderError for a model whose velocity is not noise minus picture."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, CONST):
        raise SliderError(
            f"The model samples by {type(sampling).__name__}, which is not flow matching; expected a FLUX.1 model "
            "without nodes that change that."
        )


def check_image_latent(model: ModelPatcher, latent: torch.Tensor) -> None:
    """Raise SliderError for a latent that is no encoded picture of this model."""
    channels = model.get_model_object("latent_format").latent_channels
    if latent.ndim != 4 or latent.shape[1] != channels or not latent.isfinite().all() or not latent.any():
        raise SliderError(
            f"The latent {tuple(latent.shape)} is empty, holds numbers that are none, or is no picture for this model; "
            f"expected {channels} channels, encoded by VAEEncode with the model's own VAE."
        )


def run_sampler(
    model: ModelPatcher,
    conditioning: Conditioning,
    sampler: Sampler,
    sigmas: torch.Tensor,
    latent: torch.Tensor,
    on_step: OnStep | None,
) -> torch.Tensor:
    """Let a sampler run over the model with nothing but this conditioning, from no noise."""
    guider = CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    samples = guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=on_step, disable_pbar=True)
    return samples.to(comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype())
