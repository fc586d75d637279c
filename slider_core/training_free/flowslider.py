"""Edits that start from the source itself, with one strength: fidelity to the source plus strength times steering.

FlowSlider, arXiv 2604.02088, on FlowEdit's path without inversion (arXiv 2412.08629). At noise level sigma, with one
noise n for all of them, z_src = (1 - sigma) x_src + sigma n and z_tar = z + z_src - x_src, and z, which begins as
x_src, moves with

    v(z_tar, source) - v(z_src, source) + strength * (v(z_tar, target) - v(z_tar, source))

where the prompts are those of the source and of the edit. Strength 0 stays at x_src, strength 1 is FlowEdit.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from comfy.model_management import intermediate_device, intermediate_dtype
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler, calc_cond_batch, cfg_function

from ..conditioning.per_image_cond import check_batch
from ..conditioning.schedule import check_schedule_range
from ..patching.forward_patches import in_schedule_range
from ..sampling.flow_matching import check_flow_matching, check_image_latent, check_sigmas
from ..strength import Strengths
from ..types import Conditioning, OnStep


def sample_flowslider(
    model: ModelPatcher,
    source: Conditioning,
    target: Conditioning,
    latent: torch.Tensor,
    noise: torch.Tensor,
    strength: Strengths,
    sigmas: torch.Tensor,
    seed: int | None = None,
    mask: torch.Tensor | None = None,
    end: float = 1.0,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Edit pictures from the source prompt to the target prompt: (images, channels, height, width).

    latent: (1 or images, channels, height, width), the source as an autoencoder gives it; noise: of the same shape.
    strength: one, or one per image. sigmas: falling, see scheduler_sigmas. mask: multiplies what moves, as a
    sampler's noise mask. end: share of the schedule, 0 to 1, after which the strength is 0. Costs three
    evaluations of the model per step, and two after `end`.
    Raises SliderError for a model or noise levels that are not those of flow matching, a latent that is no picture, and
    a batch that the strengths do not fit.
    """
    check_schedule_range(0.0, end)
    check_flow_matching(model)
    check_sigmas(sigmas)
    check_image_latent(model, latent)
    images = len(strength) if len(latent) == 1 else len(latent)
    check_batch(len(strength), images)
    latent, noise = (one.expand(images, -1, -1, -1) for one in (latent, noise))
    guider = RolesGuider(model)
    guider.inner_set_conds({STAYING: source, MOVING: source, AIMING: target})
    sampler = FlowSliderSampler(strength, end)
    samples = guider.sample(noise, latent, sampler, sigmas, mask, callback=on_step, disable_pbar=True, seed=seed)
    return samples.to(intermediate_device(), intermediate_dtype())


STAYING, MOVING, AIMING = "source prompt, source", "source prompt, edit", "target prompt, edit"
"""What a prompt is evaluated for. The source prompt has a name for each, since caches go by the cond."""


class RolesGuider(CFGGuider):
    """Gives a sampler the velocities of several prompts, each as the model is patched, without guidance."""

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level at a share of the schedule."""
        return self.inner_model.model_sampling.percent_to_sigma(percent)

    def velocities(
        self, x: torch.Tensor, sigma: torch.Tensor, roles: tuple[str, ...], options: dict[str, Any]
    ) -> list[torch.Tensor]:
        """One of x's shape per role; sigma is 0-dim."""
        levels = sigma.expand(len(x))
        conds = [self.conds[role] for role in roles]
        found = calc_cond_batch(self.inner_model, conds, x, levels, options)
        denoised = [
            cfg_function(self.inner_model, one, one, 1.0, x, levels, options, cond) for one, cond in zip(found, conds)
        ]
        return [(x - one) / sigma for one in denoised]


class FlowSliderSampler(Sampler):
    """The Euler steps, for RolesGuider."""

    def __init__(self, strength: Strengths, end: float = 1.0):
        self.strength, self.end = strength, end

    def sample(
        self,
        guider: RolesGuider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: OnStep | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """From the source to its edit, both in the model's own scale."""
        options, z = extra_args["model_options"], latent_image
        strength = torch.tensor(self.strength).view(-1, *[1] * (z.ndim - 1)).to(z)
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            z_src = (1 - sigma) * latent_image + sigma * noise
            z_tar = z + z_src - latent_image
            [staying] = guider.velocities(z_src, sigma, (STAYING,), options)
            if in_schedule_range(sigma, guider.percent_to_sigma, 0.0, self.end):
                moving, aiming = guider.velocities(z_tar, sigma, (MOVING, AIMING), options)
                velocity = moving - staying + strength * (aiming - moving)
            else:
                [moving] = guider.velocities(z_tar, sigma, (MOVING,), options)
                velocity = moving - staying
            if denoise_mask is not None:
                velocity = velocity * denoise_mask
            z, expected = z + (following - sigma) * velocity, z - sigma * velocity
            if callback is not None:
                callback(step, expected, z, len(sigmas) - 1)
        return z
