"""FlowSlider: from the source to its edit without inversion, with one strength for the whole edit.

    dz/dsigma = v(z_tar, source) - v(z_src, source) + s * (v(z_tar, target) - v(z_tar, source))
                [--------- fidelity ----------]         [------------- steering -------------]

    z_src = (1 - sigma) x_src + sigma n        z_tar = z + z_src - x_src        z starts as x_src

v(z, prompt): predicted velocity. source, target: prompts of the source image and of the edit. x_src: source latent.
n: the same noise at all steps. sigma: noise level, falling from 1 to 0. s: strength; 0 keeps the source, 1 is FlowEdit.

Source: FlowSlider, arXiv 2604.02088, on the path of FlowEdit, arXiv 2412.08629.
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
    """Edit images by FlowSlider: the samples, of shape (images, channels, height, width).

    source, target: conditioning of the source prompt and of the target prompt.
    latent: (1 or images, channels, height, width), the source as encoded by a VAE. noise: as `latent`.
    strength: one value, or one per image. sigmas: decreasing, see scheduler_sigmas.
    mask: multiplies the velocity, as ComfyUI's noise_mask does in other samplers.
    end: fraction of the sampling steps, 0 to 1, after which the strength is 0.
    Each step takes three model evaluations, or two after `end`.
    Raises SliderError for models and sigmas that are not flow matching, an `end` that is not in (0, 1], a latent that
    is not an image, and a batch size that does not match the strengths.
    """
    check_schedule_range(0.0, end)
    check_flow_matching(model)
    check_sigmas(sigmas)
    check_image_latent(model, latent)
    images = len(strength) if len(latent) == 1 else len(latent)
    check_batch(len(strength), images)
    latent, noise = (tensor.expand(images, -1, -1, -1) for tensor in (latent, noise))
    guider = VelocityGuider(model)
    guider.inner_set_conds({SOURCE_AT_SRC: source, SOURCE_AT_TAR: source, TARGET_AT_TAR: target})
    sampler = FlowSliderSampler(strength, end)
    samples = guider.sample(noise, latent, sampler, sigmas, mask, callback=on_step, disable_pbar=True, seed=seed)
    return samples.to(intermediate_device(), intermediate_dtype())


SOURCE_AT_SRC, SOURCE_AT_TAR = "source prompt at z_src", "source prompt at z_tar"
TARGET_AT_TAR = "target prompt at z_tar"
"""Names of the guider's conds. The source prompt has two, since caches such as EasyCache tell inputs apart by cond."""


class VelocityGuider(CFGGuider):
    """A guider that gives the sampler a velocity for each of several prompts, without classifier-free guidance."""

    def percent_to_sigma(self, percent: float) -> float:
        """The sigma at this fraction of the sampling steps."""
        return self.inner_model.model_sampling.percent_to_sigma(percent)

    def velocities(
        self, x: torch.Tensor, sigma: torch.Tensor, cond_names: tuple[str, ...], options: dict[str, Any]
    ) -> list[torch.Tensor]:
        """The velocity at `x` for each of the named conds, each of the shape of `x`. sigma is a scalar tensor."""
        sigmas = sigma.expand(len(x))
        conds = [self.conds[name] for name in cond_names]
        predictions = calc_cond_batch(self.inner_model, conds, x, sigmas, options)
        denoised = [
            cfg_function(self.inner_model, prediction, prediction, 1.0, x, sigmas, options, cond)
            for prediction, cond in zip(predictions, conds)
        ]
        return [(x - x_0) / sigma for x_0 in denoised]


class FlowSliderSampler(Sampler):
    """Euler steps of FlowSlider; requires a VelocityGuider."""

    def __init__(self, strength: Strengths, end: float = 1.0):
        self.strength, self.end = strength, end

    def sample(
        self,
        guider: VelocityGuider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: OnStep | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """The edit of `latent_image`; both are scaled as the model expects (process_latent_in)."""
        options, z = extra_args["model_options"], latent_image
        strength = torch.tensor(self.strength).view(-1, *[1] * (z.ndim - 1)).to(z)
        for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
            z_src = (1 - sigma) * latent_image + sigma * noise
            z_tar = z + z_src - latent_image
            [v_src] = guider.velocities(z_src, sigma, (SOURCE_AT_SRC,), options)
            if in_schedule_range(sigma, guider.percent_to_sigma, 0.0, self.end):
                v_tar, v_edit = guider.velocities(z_tar, sigma, (SOURCE_AT_TAR, TARGET_AT_TAR), options)
                velocity = v_tar - v_src + strength * (v_edit - v_tar)
            else:
                [v_tar] = guider.velocities(z_tar, sigma, (SOURCE_AT_TAR,), options)
                velocity = v_tar - v_src
            if denoise_mask is not None:
                velocity = velocity * denoise_mask
            z, prediction = z + (next_sigma - sigma) * velocity, z - sigma * velocity
            if callback is not None:
                callback(step, prediction, z, len(sigmas) - 1)
        return z
