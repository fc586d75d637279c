"""Token interpolation: a span's tokens, interpolated with a padding token at the input of every attention.

    y[token] = s[token] * y[token] + (1 - s[token]) * y[pad]

y: text tokens at the attention's input. s: strength of each text token, 1 outside all spans. Weaker and less smooth
than the paper's adapter; strengths are uncalibrated.

Source: SliderEdit, arXiv 2511.09715, section on interpretability.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.span_strengths import DEFAULT_CHANNEL, padding_token, token_suppression
from ..families import family_of
from ..families.network import diffusion_model_of
from ..patching.forward_patches import Forward, ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch


class TokenInterpolation(ModelPatch):
    """Interpolates the Q, K and V of text tokens with those of a padding token.

    Applied to the outputs of the Q/K/V linears instead of the attention's input. This is equivalent, because affine
    maps preserve affine combinations (weights s and 1 - s), and leaves the MLP alone that shares its linear with Q, K
    and V in single blocks.

    paths: linears whose outputs start with Q, K and V, each `hidden_size` features wide.
    """

    phase = Phase.REPLACE
    batch_independent = True

    def __init__(self, paths: list[str], hidden_size: int, channel: str):
        self.paths, self.hidden_size, self.channel = paths, hidden_size, channel

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        suppressions = token_suppression(context, self.channel)
        if suppressions is None:
            return {}
        wrapper = _interpolate(suppressions[:, :, None], padding_token(context, self.channel), 3 * self.hidden_size)
        return dict.fromkeys(self.paths, wrapper)


def apply_token_interpolation(model: ModelPatcher, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that applies the span strengths of its conds on `channel` by token interpolation.

    Raises SliderError for unsupported models; when sampling, for a prompt without padding tokens.
    """
    family, inner = family_of(model), diffusion_model_of(model.model)
    return add_patch(model, TokenInterpolation(family.text_qkv(inner), family.hidden_size(inner), channel))


def _interpolate(suppressions: torch.Tensor, padding: int, features: int) -> ForwardWrapper:
    """Interpolates the first tokens of an output with its token at index `padding`, in place.

    suppressions: 1 - strength, (batch, tokens, 1). features: number of leading output features that are changed.
    """

    def wrap(forward: Forward) -> Forward:
        def interpolated_forward(x: torch.Tensor) -> torch.Tensor:
            y = forward(x)
            text = y[:, : suppressions.shape[1], :features]
            text.lerp_(text[:, padding : padding + 1].clone(), suppressions.to(y.dtype))
            return y

        return interpolated_forward

    return wrap
