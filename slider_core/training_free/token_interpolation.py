"""Strengths without an adapter: a span's tokens, replaced little by little by padding (SliderEdit, Interpretability).

Uncalibrated: weaker and less smooth than the paper's adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.span_strengths import DEFAULT_CHANNEL, padding_token, token_scales
from ..families import family_of
from ..families.network import diffusion_model_of
from ..patching.forward_patches import Forward, ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch


class TokenInterpolation(ModelPatch):
    """Operation: at the input of every attention, s * y + (1 - s) * y_pad for the vector y of a token of strength s.

    Done behind the linears that make Q, K and V of it, which is the same: they keep sums whose shares add up to 1. So
    the MLP that shares its linear with them in single blocks is left alone.
    """

    phase = Phase.REPLACE
    batch_independent = True

    def __init__(self, paths: list[str], width: int, channel: str):
        self.paths, self.width, self.channel = paths, width, channel

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        scales = token_scales(context, self.channel)
        if scales is None:
            return {}
        change = _towards(padding_token(context, self.channel), scales[:, :, None], 3 * self.width)
        return dict.fromkeys(self.paths, change)


def apply_token_interpolation(model: ModelPatcher, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that obeys the span strengths of its conds by padding in place of tokens, without an adapter.

    When sampling, raises SliderError for a prompt without padding.
    """
    family, inner = family_of(model), diffusion_model_of(model.model)
    return add_patch(model, TokenInterpolation(family.text_qkv(inner), family.hidden_size(inner), channel))


def _towards(row: int, scales: torch.Tensor, columns: int) -> ForwardWrapper:
    """Moves the first rows of an output towards one of them, by scales of shape (batch, rows, 1)."""

    def wrap(forward: Forward) -> Forward:
        def moved(x: torch.Tensor) -> torch.Tensor:
            y = forward(x)
            text = y[:, : scales.shape[1], :columns]
            text.lerp_(text[:, row : row + 1].clone(), scales.to(y.dtype))
            return y

        return moved

    return wrap
