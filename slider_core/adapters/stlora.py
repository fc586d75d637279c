"""STLoRA (Selective Token LoRA): an adapter that acts on the tokens of chosen instructions, each with its own strength.

    z' = W z + a[token] * scale * B A z        a[token] = prod_k (1 - s_k)

W: a linear of the text stream of the double blocks; z: one text token. B, A: the adapter's low-rank weights, trained to
suppress instructions. scale: LoRA alpha / rank. s_k: strengths of the spans that contain the token. a, the suppression,
is 0 for tokens outside all spans.

Source: SliderEdit, arXiv 2511.09715, section on Selective Token LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.span_strengths import DEFAULT_CHANNEL, token_suppression
from ..families import family_of
from ..patching.forward_patches import ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch
from .adapter_file import Adapter


class STLoRAPatch(ModelPatch):
    """Adds the adapter's LoRA branches, weighted by each token's suppression, to the text stream."""

    phase = Phase.ADD
    branch_patcher: ModelPatcher
    batch_independent = True

    def __init__(self, adapter: Adapter, channel: str, load_device: torch.device):
        self.channel = channel
        self.branch_patcher = adapter.lora_branches.patcher(load_device)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        suppressions = token_suppression(context, self.channel)
        return {} if suppressions is None else self.branch_patcher.model.forward_wrappers(suppressions)


def apply_stlora(model: ModelPatcher, adapter: Adapter, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that applies the span strengths of its conds on `channel` through `adapter`.

    If no strength is set, or all strengths are 1, the result is that of the model without the adapter.
    Raises SliderError for adapters that are not STLoRAs or do not fit the model, and for unsupported models.
    """
    family = family_of(model)
    adapter.require_type("STLoRA")
    adapter.check_fit(model, family)
    return add_patch(model, STLoRAPatch(adapter, channel, model.load_device))
