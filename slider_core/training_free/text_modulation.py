"""Text modulation: the AdaLN modulation of a span's tokens, scaled by the span's strength.

    (shift, scale, gate)[token] = s[token] * (shift, scale, gate)      in both text modulations of every double block

s: strength of each text token, 1 outside all spans. The paper found that the factor affects the edit, but not in
proportion, so strengths are uncalibrated.

Source: Kontinuous Kontext, arXiv 2510.08532, appendix A.4.
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
    """Multiplies the shift, scale and gate of each text token by the token's strength. paths: modulation modules."""

    phase = Phase.SCALE
    batch_independent = True

    def __init__(self, paths: list[str], channel: str):
        self.paths, self.channel = paths, channel

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        strengths = token_strengths(context, self.channel)
        return {} if strengths is None else dict.fromkeys(self.paths, _scale_modulation(strengths[:, :, None]))


def apply_text_modulation(model: ModelPatcher, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that applies the span strengths of its conds on `channel` by scaling text modulation.

    Raises SliderError for unsupported models.
    """
    paths = family_of(model).text_modulations(diffusion_model_of(model.model))
    return add_patch(model, TextModulation(paths, channel))


def _scale_modulation(factor: torch.Tensor) -> ForwardWrapper:
    """Wraps a module that returns modulations of shape (batch, 1, width); factor: (batch, tokens, 1)."""

    def wrap(forward: Forward) -> Forward:
        def scaled_forward(vec: torch.Tensor) -> Any:
            return tuple(
                type(out)(*(value * factor.to(value.dtype) for value in (out.shift, out.scale, out.gate)))
                for out in forward(vec)
            )

        return scaled_forward

    return wrap
