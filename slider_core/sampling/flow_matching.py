"""Flow matching: sigmas, checks, and the sampling loop of the pack's own samplers.

At noise level sigma, from 1 (noise) to 0 (image), x = (1 - sigma) * image + sigma * noise. The model predicts the
velocity v = noise - image; Euler steps are x_next = x + (sigma_next - sigma) * v.
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
"""(x, sigma) -> predicted image latents of x's shape, with guidance as the guider applies it; sigma: 0-dim."""


class StepSampler(Sampler):
    """Base of samplers that call the model with one sigma for the entire batch. Subclasses implement sample_loop."""

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
        """Integrate from the first to the last sigma. Returns the latents at the last sigma."""
        raise NotImplementedError


def scheduler_sigmas(model: ModelPatcher, scheduler: str, steps: int, start: float = 0.0) -> torch.Tensor:
    """The sigmas of a scheduler, falling to 0; start: fraction of the schedule (0 to 1) to leave out at the beginning.

    Raises SliderError when no step is left.
    """
    sampling = model.get_model_object("model_sampling")
    sigmas = calculate_sigmas(sampling, scheduler, steps)
    if start > 0:
        sigmas = sigmas[sigmas <= sampling.percent_to_sigma(start)]
    if len(sigmas) < 2:
        raise SliderError(
            f"With start {start:g}, none of the {steps} step(s) of {scheduler!r} are left; expected at least one. "
            "Raise steps or lower start."
        )
    return sigmas


def check_sigmas(sigmas: torch.Tensor) -> None:
    """Raise SliderError unless the sigmas fall from at most 1 to 0, as those of flow matching models do."""
    falling = sigmas.ndim == 1 and len(sigmas) >= 2 and bool((sigmas.diff() < 0).all())
    if not falling or not 0 < sigmas[0] <= 1 or sigmas[-1] != 0:
        first_values = ", ".join(f"{value:g}" for value in sigmas.flatten()[:4].tolist())
        raise SliderError(
            f"The sigmas begin with {first_values}; expected at least two that fall from at most 1 to 0, as those of a "
            "flow matching model do. Use 'BasicScheduler' with this model and denoise 1."
        )


def check_flow_matching(model: ModelPatcher) -> None:
    """Raise SliderError unless the model predicts the velocity noise - image."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, CONST):
        raise SliderError(
            f"The model samples by {type(sampling).__name__}, which is not flow matching; expected a FLUX.1 model. "
            "Remove nodes that change its sampling."
        )


def check_image_latent(model: ModelPatcher, latent: torch.Tensor) -> None:
    """Raise SliderError unless this is a non-empty image latent (batch, channels, height, width) for the model."""
    channels = model.get_model_object("latent_format").latent_channels
    if latent.ndim != 4 or latent.shape[1] != channels or not latent.isfinite().all() or not latent.any():
        raise SliderError(
            f"The latent of shape {tuple(latent.shape)} is empty, contains values that are not finite, or does not fit "
            f"this model; expected an image with {channels} channels, from 'VAE Encode' with the model's own VAE."
        )


def run_sampler(
    model: ModelPatcher,
    conditioning: Conditioning,
    sampler: Sampler,
    sigmas: torch.Tensor,
    latent: torch.Tensor,
    on_step: OnStep | None,
) -> torch.Tensor:
    """Run a sampler on a latent with one conditioning, at cfg 1 and without adding noise.

    latent and the result: (batch, channels, height, width), in the VAE's scale. sigmas: as the sampler expects them.
    """
    guider = CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    samples = guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=on_step, disable_pbar=True)
    return samples.to(comfy.model_management.intermediate_device(), comfy.model_management.intermediate_dtype())
