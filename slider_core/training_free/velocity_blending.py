"""Velocity blending: the predicted velocity, blended with the velocity that leads back to the source.

    v = (1 - s) v_keep + s v_model        v_keep = (x_t - x_src) / sigma

This predicts the image (1 - s) x_src + s x_model. s: strength. x_t: noisy latent at noise level sigma. x_src: source
latent. v_model, x_model: the model's velocity and predicted image. For models that get the source as a reference
latent, such as FLUX.1 Kontext.

Source: VeloEdit, arXiv 2603.13388.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.active_region import EVERYWHERE, ActiveRegion
from ..conditioning.per_image_cond import check_batch
from ..errors import SliderError
from ..patching.forward_patches import in_schedule_range
from ..strength import Strengths


@dataclass(frozen=True, eq=False)
class VelocityBlending:
    """ComfyUI's post-CFG function that blends the predicted image with the source; fields as in blend_velocity."""

    source: torch.Tensor
    strength: Strengths
    difference_threshold: float
    region: ActiveRegion

    def __call__(self, args: Mapping[str, Any]) -> torch.Tensor:
        denoised, model, region = args["denoised"], args["model"], self.region
        _check_source(self.source, denoised)
        check_batch(len(self.strength), denoised.shape[0])
        if not in_schedule_range(args["sigma"][0], model.model_sampling.percent_to_sigma, region.start, region.end):
            return denoised
        source = model.process_latent_in(self.source).to(denoised)
        strength = torch.tensor(self.strength).view(-1, *[1] * (denoised.ndim - 1)).to(denoised)
        if region.mask is not None:
            strength = strength * comfy.utils.reshape_mask(region.mask, denoised.shape).to(denoised)
        if self.difference_threshold > 0:
            difference = (denoised - source).abs().mean(1, keepdim=True)
            strength = strength * (difference >= self.difference_threshold)
        return torch.lerp(source.expand_as(denoised), denoised, strength)


def blend_velocity(
    model: ModelPatcher,
    source: torch.Tensor,
    strength: Strengths,
    difference_threshold: float = 0.0,
    region: ActiveRegion = EVERYWHERE,
) -> ModelPatcher:
    """A clone of `model` whose predictions are blended with the source at this strength.

    source: (1 or images, channels, height, width), as encoded by a VAE. strength: one value, or one per image.
    difference_threshold: where the prediction differs from the source by less than this (mean absolute difference over
    the channels, in the model's own latent scale), the source is kept.
    region: outside its schedule range predictions are left alone; its mask multiplies the strength.
    Raises SliderError for an empty source; when sampling, for a source of another size than the sampled latent and a
    batch size that does not match the source or the strengths.
    """
    if not source.any():
        raise SliderError("The source latent is empty; expected the image to edit. Connect the output of 'VAE Encode'.")
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(VelocityBlending(source, strength, difference_threshold, region))
    return patched


def _check_source(source: torch.Tensor, sampled: torch.Tensor) -> None:
    if source.shape[1:] != sampled.shape[1:]:
        raise SliderError(
            f"The source latent is {_shape(source)}, but the sampled latent is {_shape(sampled)} (channels x height x "
            "width); expected the same size. Sample at the size of the source, or resize the source before "
            "'VAE Encode'."
        )
    if source.shape[0] not in (1, sampled.shape[0]):
        raise SliderError(
            f"There are {source.shape[0]} source latents for a batch of {sampled.shape[0]} image(s); expected one "
            "source, or one per image."
        )


def _shape(latent: torch.Tensor) -> str:
    return " x ".join(map(str, latent.shape[1:]))
