"""Real pictures: nudged inversion, and edits that start from it (Stable Flow, section 3.3)."""

from __future__ import annotations

import itertools

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

FOLLOWS = "follows the trajectory"
PUBLISHED = "as in the published code"
FREE = "is left alone"


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
    """Run a picture backwards to noise, and keep every latent on the way.

    latent: (1, channels, height, width) as an autoencoder gives it. sigmas: noise levels falling to 0. conditioning:
    the source prompt, at guidance 1; prompt: its words. refinements: times that each step is repeated with the
    velocity at its own result (0 = the paper); each costs a model evaluation per step. on_step: see OnStep.
    Raises SliderError for a batch, a model or noise levels that are not those of flow matching.
    """
    if latent.shape[0] != 1:
        raise SliderError(f"The latent has {latent.shape[0]} pictures; expected one to invert.")
    check_flow_matching(model)
    check_sigmas(sigmas)
    check_image_latent(model, latent)
    if conditioning[0][1].get("pooled_output") is None:
        raise SliderError("The source prompt has no pooled vector; expected one, from FLUX.1's text encoders.")
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
    source: str = FOLLOWS,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """Render a batch of prompts from the noise that a picture was inverted to: (prompts, channels, height, width).

    conditioning: one cond with a prompt per picture. source: what becomes of the first picture after each step. It
    takes the trajectory's latent of the same noise level; or that two steps earlier, as in the published code; or is
    left alone (when the source is not in the batch).
    Raises SliderError for a trajectory of another model, and for a batch of one that would only hold the source.
    """
    trajectory.check_model(model)
    check_flow_matching(model)
    pictures = conditioning[0][0].shape[0]
    if source != FREE:
        if pictures < 2:
            raise SliderError(
                f"The batch is one prompt, which would be the source itself; expected the source and at least one "
                f"edit. For a source outside of the batch choose {FREE!r}."
            )
        trajectory.check_source(conditioning)
    empty = torch.zeros(pictures, *trajectory.latents.shape[1:])
    return run_sampler(model, conditioning, EulerFromTrajectory(trajectory, source), trajectory.sigmas, empty, on_step)


class InverseEuler(StepSampler):
    """From picture to noise. sigmas rise; the velocity is taken at the noise level that a step leads to."""

    def __init__(self, nudging: float, refinements: int):
        self.nudging, self.refinements = nudging, refinements
        self.latents: list[torch.Tensor] = []

    def sample_loop(
        self, denoise: Denoise, sigmas: torch.Tensor, latent: torch.Tensor, on_step: OnStep
    ) -> torch.Tensor:
        x = latent * self.nudging
        self.latents = [x.cpu()]
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            estimate = x
            for _ in range(1 + self.refinements):
                denoised = denoise(estimate, following)
                estimate = x + (following - sigma) * (estimate - denoised) / following
            x = estimate
            self.latents.append(x.cpu())
            on_step(step, denoised, x, len(sigmas) - 1)
        return x


class EulerFromTrajectory(StepSampler):
    """From the end of a trajectory to a batch of pictures."""

    def __init__(self, trajectory: Trajectory, source: str):
        self.trajectory, self.source = trajectory, source

    def sample_loop(
        self, denoise: Denoise, sigmas: torch.Tensor, latent: torch.Tensor, on_step: OnStep
    ) -> torch.Tensor:
        latents, steps = self.trajectory.latents.to(latent), len(sigmas) - 1
        x = latents[:1].repeat(len(latent), 1, 1, 1)
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            denoised = denoise(x, sigma)
            x = x + (following - sigma) * (x - denoised) / sigma
            if self.source == FOLLOWS:
                x[0] = latents[step + 1]
            elif self.source == PUBLISHED:
                x[0] = latents[_published_entry(step, steps)]
            on_step(step, denoised, x, steps)
        return x


def _published_entry(step: int, steps: int) -> int:
    """Stable Flow's code takes entry -step of its list, which runs from the least noisy latent to noise."""
    return steps - 1 if step == 0 else step - 1
