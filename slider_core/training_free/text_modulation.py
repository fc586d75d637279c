"""Strengths without an adapter: the modulation of a span's tokens, scaled (Kontinuous Kontext, A.4).

Uncalibrated: the paper found that the factor moves an edit, but not in proportion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.span_strengths import DEFAULT_CHANNEL, token_strengths
from ..families import family_of
from ..families.network import diffusion_model_of
from ..patching.forward_patches import Forward, ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch


class TextModulation(ModelPatch):
    """Operation: shift, scale and gate of every text token, in every double block, times the token's strength."""

    phase = Phase.SCALE
    batch_independent = True

    def __init__(self, paths: list[str], channel: str):
        self.paths, self.channel = paths, channel

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        strengths = token_strengths(context, self.channel)
        return {} if strengths is None else dict.fromkeys(self.paths, _scaled(strengths[:, :, None]))


def apply_text_modulation(model: ModelPatcher, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that obeys the span strengths of its conds by their tokens' modulation, without an adapter."""
    paths = family_of(model).text_modulations(diffusion_model_of(model.model))
    return add_patch(model, TextModulation(paths, channel))


def _scaled(factor: torch.Tensor) -> ForwardWrapper:
    """Around a modulation whose parts have shape (batch, 1, width), by a factor of shape (batch, rows, 1)."""

    def wrap(forward: Forward) -> Forward:
        def with_factor(vec: torch.Tensor) -> Any:
            return tuple(
                type(part)(*(value * factor.to(value.dtype) for value in (part.shift, part.scale, part.gate)))
                for part in forward(vec)
            )

        return with_factor

    return wrap
