"""Editing real images: inversion with latent nudging and latent caching (Stable Flow, arXiv 2411.14430, section 3.3).

The image latent z_0 is multiplied by the nudging factor lambda and integrated from image to noise by the inverse Euler
ODE, with the source prompt. For ascending noise levels sigma:

    z <- lambda z_0        z_next = z + (sigma_next - sigma) v(z, sigma_next)

All z are kept as a trajectory. Edits start from its last latent and are integrated back to sigma 0; after each step the
source in the batch is set to the trajectory's latent of that noise level.
"""

from __future__ import annotations

import itertools
from enum import Enum

import torch
from comfy.model_patcher import ModelPatcher

from ..errors import SliderError
from ..patching.model_fingerprint import fingerprint_of
from ..sampling.flow_matching import (
    Denoise,
    StepSampler,
    check_flow_matching,
    check_image_latent,
    check_sigmas,
    run_sampler,
)
from ..types import Conditioning, OnStep
from .trajectory import Trajectory

NUDGING = 1.15


class SourceMode(Enum):
    """What is done with the source when edits of a trajectory are sampled; the values are saved in workflows.

    TRAJECTORY: image 0 of the batch is set to the trajectory's latent of the same noise level after each step.
    PUBLISHED: image 0 is set to the latent two steps earlier, as the published code does.
    CACHED: the source is not in the batch; all images are sampled freely.
    """

    TRAJECTORY = "follows the trajectory"
    PUBLISHED = "as in the published code"
    CACHED = "remembered by the model"


def invert(
    model: ModelPatcher,
    conditioning: Conditioning,
    latent: torch.Tensor,
    sigmas: torch.Tensor,
    prompt: str,
    nudging: float = NUDGING,
    refinements: int = 0,
    on_step: OnStep | None = None,
) -> Trajectory:
    """Integrate an image from sigma 0 to noise and keep the latent of every noise level.

    latent: (1, channels, height, width), as encoded by the VAE. sigmas: noise levels falling to 0. conditioning: the
    source prompt at guidance 1; prompt: its text. refinements: how often each step is repeated with the velocity
    evaluated at the step's own result (0 = the paper); each costs one more model evaluation per step.
    Raises SliderError for a batch, and for a model, latent, prompt or sigmas that cannot be inverted.
    """
    if latent.shape[0] != 1:
        raise SliderError(f"The latent has {latent.shape[0]} images; expected one to invert.")
    check_flow_matching(model)
    check_sigmas(sigmas)
    check_image_latent(model, latent)
    if conditioning[0][1].get("pooled_output") is None:
        raise SliderError("The source prompt has no pooled vector; expected one, from the text encoders of FLUX.1.")
    sampler = InverseEuler(nudging, refinements)
    run_sampler(model, conditioning, sampler, sigmas.flip(0), latent, on_step)
    text, options = conditioning[0]
    return Trajectory(
        latents=torch.cat(sampler.latents[::-1]),
        sigmas=sigmas.cpu(),
        text=text[:1].cpu(),
        pooled=options["pooled_output"][:1].cpu(),
        prompt=prompt,
        nudging=nudging,
        refinements=refinements,
        model=fingerprint_of(model),
    )


def edit_from_trajectory(
    model: ModelPatcher,
    conditioning: Conditioning,
    trajectory: Trajectory,
    mode: SourceMode = SourceMode.TRAJECTORY,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Sample a batch of prompts from the trajectory's noise: (prompts, channels, height, width).

    conditioning: one cond entry with a prompt per image; unless mode is CACHED, the first is the source prompt.
    Raises SliderError for a trajectory of another model or source prompt, and for a batch that has only the source.
    """
    trajectory.check_model(model)
    check_flow_matching(model)
    batch_size = conditioning[0][0].shape[0]
    if mode is not SourceMode.CACHED:
        if batch_size < 2:
            raise SliderError(
                "There is one prompt, which would be the source itself; expected the source and at least one edit. "
                f"For a source that is not in the batch, choose {SourceMode.CACHED.value!r}."
            )
        trajectory.check_source(conditioning)
    empty = torch.zeros(batch_size, *trajectory.latents.shape[1:])
    return run_sampler(model, conditioning, EulerFromTrajectory(trajectory, mode), trajectory.sigmas, empty, on_step)


class InverseEuler(StepSampler):
    """Inverse Euler steps from image to noise, for ascending sigmas; `latents` holds the result of every step."""

    def __init__(self, nudging: float, refinements: int):
        self.nudging, self.refinements = nudging, refinements
        self.latents: list[torch.Tensor] = []

    def sample_loop(
        self, denoise: Denoise, sigmas: torch.Tensor, latent: torch.Tensor, on_step: OnStep
    ) -> torch.Tensor:
        x = latent * self.nudging
        self.latents = [x.cpu()]
        for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
            estimate = x
            for _ in range(1 + self.refinements):
                denoised = denoise(estimate, next_sigma)
                estimate = x + (next_sigma - sigma) * (estimate - denoised) / next_sigma
            x = estimate
            self.latents.append(x.cpu())
            on_step(step, denoised, x, len(sigmas) - 1)
        return x


class EulerFromTrajectory(StepSampler):
    """Euler steps from a trajectory's noise to a batch of images."""

    def __init__(self, trajectory: Trajectory, mode: SourceMode):
        self.trajectory, self.mode = trajectory, mode

    def sample_loop(
        self, denoise: Denoise, sigmas: torch.Tensor, latent: torch.Tensor, on_step: OnStep
    ) -> torch.Tensor:
        latents, num_steps = self.trajectory.latents.to(latent), len(sigmas) - 1
        x = latents[:1].repeat(len(latent), 1, 1, 1)
        for step, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
            denoised = denoise(x, sigma)
            x = x + (next_sigma - sigma) * (x - denoised) / sigma
            if self.mode is SourceMode.TRAJECTORY:
                x[0] = latents[step + 1]
            elif self.mode is SourceMode.PUBLISHED:
                x[0] = latents[_published_index(step, num_steps)]
            on_step(step, denoised, x, num_steps)
        return x


def _published_index(step: int, num_steps: int) -> int:
    """Index into Trajectory.latents that the published code uses after a step: item -step of its reversed list."""
    return num_steps - 1 if step == 0 else step - 1
