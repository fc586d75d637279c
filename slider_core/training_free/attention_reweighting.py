"""Attention reweighting: attention of image tokens to a span's tokens, multiplied by the span's strength.

    A = softmax(Q K^T / sqrt(d) + log s)        for image queries and text keys, in every block

s: strength of each text token, 1 outside all spans; rows of A still sum to 1. Strengths are uncalibrated: in the paper
this is a baseline, with abrupt transitions.

Source: Kontinuous Kontext, arXiv 2510.08532, appendix A.8, after Prompt-to-Prompt (arXiv 2208.01626).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from .. import node_names as names
from ..conditioning.span_strengths import DEFAULT_CHANNEL, token_strengths
from ..errors import SliderError
from ..families import family_of
from ..patching.forward_patches import AttentionPatch, ForwardContext, ModelPatch, Phase, add_patch


class AttentionReweighting(ModelPatch):
    """Adds log(strength) of each text token to the attention scores of image queries, in every block."""

    phase = Phase.SCALE
    batch_independent = True

    def __init__(self, channel: str):
        self.channel = channel

    def attention_patches(self, context: ForwardContext) -> Sequence[AttentionPatch]:
        strengths = token_strengths(context, self.channel)
        if strengths is None:
            return ()
        if (strengths < 0).any():
            raise SliderError(
                "A strength is below 0, but attention cannot be negative; expected 0 or more. Choose another method of "
                f"'{names.APPLY_TRAINING_FREE}' for negative strengths."
            )
        return (_add_to_scores(strengths.log()),)


def apply_attention_reweighting(model: ModelPatcher, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that applies the span strengths of its conds on `channel` by attention reweighting.

    Allocates an attention mask with (text + image tokens)^2 elements per image, and rules out attention kernels that
    do not support masks. Raises SliderError for unsupported models; when sampling, for negative strengths.
    """
    family_of(model)
    return add_patch(model, AttentionReweighting(channel))


def _add_to_scores(bias: torch.Tensor) -> AttentionPatch:
    """Adds `bias`, of shape (batch, text tokens), to the scores of image queries; -inf excludes a text token."""
    masks: dict[int, torch.Tensor] = {}

    def patch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        tokens, text_tokens = q.shape[2], bias.shape[1]
        if tokens not in masks:
            mask = torch.zeros(bias.shape[0], 1, tokens, tokens, dtype=q.dtype, device=q.device)
            mask[:, :, text_tokens:, :text_tokens] = bias[:, None, None].to(q.dtype)
            masks[tokens] = mask
        return {"attn_mask": _combine_masks(masks[tokens], inputs.get("attn_mask"))}

    return patch


def _combine_masks(mask: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    if other is None:
        return mask
    if other.ndim == 3:
        other = other[:, None]
    return mask.masked_fill(~other, -torch.inf) if other.dtype == torch.bool else mask + other
