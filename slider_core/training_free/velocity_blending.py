"""Strength without an adapter: the model's velocity, blended with the one that leads back to the source.

VeloEdit, arXiv 2603.13388. With v_keep = (x_t - x_src) / sigma it is v = (1 - s) v_keep + s v_model, which predicts
the picture (1 - s) x_src + s x_model. For models that get the source as a reference latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.per_image_cond import check_batch
from ..conditioning.schedule import check_schedule_range
from ..errors import SliderError
from ..patching.forward_patches import in_schedule_range
from ..strength import Strengths


@dataclass(frozen=True, eq=False)
class VelocityBlending:
    """What ComfyUI calls behind classifier-free guidance, to change the predicted picture. See blend_velocity."""

    source: torch.Tensor
    strength: Strengths
    keep_below: float
    part: tuple[float, float]
    mask: torch.Tensor | None

    def __call__(self, args: Mapping[str, Any]) -> torch.Tensor:
        denoised, model = args["denoised"], args["model"]
        _check_source(self.source, denoised)
        check_batch(len(self.strength), denoised.shape[0])
        if not in_schedule_range(args["sigma"][0], model.model_sampling.percent_to_sigma, *self.part):
            return denoised
        source = model.process_latent_in(self.source).to(denoised)
        share = torch.tensor(self.strength).view(-1, *[1] * (denoised.ndim - 1)).to(denoised)
        if self.mask is not None:
            share = share * comfy.utils.reshape_mask(self.mask, denoised.shape).to(denoised)
        if self.keep_below > 0:
            share = share * ((denoised - source).abs().mean(1, keepdim=True) >= self.keep_below)
        return torch.lerp(source.expand_as(denoised), denoised, share)


def blend_velocity(
    model: ModelPatcher,
    source: torch.Tensor,
    strength: Strengths,
    keep_below: float = 0.0,
    start: float = 0.0,
    end: float = 1.0,
    mask: torch.Tensor | None = None,
) -> ModelPatcher:
    """A clone of `model` that predicts pictures between the source and its own, at this strength.

    source: (1 or images, channels, height, width) as an autoencoder gives it. keep_below: places whose mean absolute
    difference from the source over the channels, in the model's own scale of latents, is smaller keep the source.
    start, end: the part of the schedule, 0 to 1, where it does so. mask: (masks, height, width), what the strength is
    multiplied by. Raises SliderError for an empty source and a part that ends before it starts; when sampling, for a
    source of another size than what is sampled and a batch that source or strengths do not fit.
    """
    check_schedule_range(start, end)
    if not source.any():
        raise SliderError("The source latent is empty; expected the picture that is edited, from VAEEncode.")
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(VelocityBlending(source, strength, keep_below, (start, end), mask))
    return patched


def _check_source(source: torch.Tensor, sampled: torch.Tensor) -> None:
    if source.shape[1:] != sampled.shape[1:]:
        raise SliderError(
            f"The source latent has the shape {_shown(source)}, but what is sampled has {_shown(sampled)} (channels x "
            "height x width); expected the same. Sample in the source's size, or scale the source before VAEEncode."
        )
    if source.shape[0] not in (1, sampled.shape[0]):
        raise SliderError(
            f"There are {source.shape[0]} source latents, but the batch has {sampled.shape[0]} image(s); expected one "
            "source, or one per image."
        )


def _shown(latent: torch.Tensor) -> str:
    return " x ".join(map(str, latent.shape[1:]))
