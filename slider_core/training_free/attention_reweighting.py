"""Strengths without an adapter: the attention that image tokens pay to a span's tokens (Kontinuous Kontext, A.8).

Uncalibrated: a baseline of the paper (after Prompt-to-Prompt), with abrupt transitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.span_strengths import DEFAULT_CHANNEL, token_strengths
from ..errors import SliderError
from ..families import family_of
from ..patching.forward_patches import AttentionPatch, ForwardContext, ModelPatch, Phase, add_patch


class AttentionReweighting(ModelPatch):
    """Operation: attention of image tokens to every text token times its strength, in every block, then normalised."""

    phase = Phase.SCALE
    batch_independent = True

    def __init__(self, channel: str):
        self.channel = channel

    def attention_patches(self, context: ForwardContext) -> Sequence[AttentionPatch]:
        strengths = token_strengths(context, self.channel)
        if strengths is None:
            return ()
        if (strengths < 0).any():
            raise SliderError("A strength is below 0, but attention has no less than none; expected 0 or more.")
        return (_weighted(strengths.log()),)


def apply_attention_reweighting(model: ModelPatcher, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that obeys the span strengths of its conds by attention, without an adapter.

    Costs a mask of (image + text tokens) squared, and the faster attention kernels that take none.
    """
    family_of(model)
    return add_patch(model, AttentionReweighting(channel))


def _weighted(bias: torch.Tensor) -> AttentionPatch:
    """bias: (batch, text rows), added to the scores of image queries; -inf takes a row out."""
    masks: dict[int, torch.Tensor] = {}

    def patch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        rows, text = q.shape[2], bias.shape[1]
        if rows not in masks:
            mask = torch.zeros(bias.shape[0], 1, rows, rows, dtype=q.dtype, device=q.device)
            mask[:, :, text:, :text] = bias[:, None, None].to(q.dtype)
            masks[rows] = mask
        return {"attn_mask": _both(masks[rows], inputs.get("attn_mask"))}

    return patch


def _both(mask: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    if other is None:
        return mask
    if other.ndim == 3:
        other = other[:, None]
    return mask.masked_fill(~other, -torch.inf) if other.dtype == torch.bool else mask + other
