"""STLoRA: an adapter that acts on chosen tokens only, each with its own scale (SliderEdit, 'STLoRA')."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.span_strengths import DEFAULT_CHANNEL, token_scales
from ..errors import SliderError
from ..families import family_of
from ..patching.forward_patches import ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch
from .adapter_file import Adapter


class STLoRAPatch(ModelPatch):
    """Operation: z' = W z + scale[token] * B A z on the text stream, scale from the conds of each call."""

    phase = Phase.ADD
    lora_branches: ModelPatcher
    batch_independent = True

    def __init__(self, adapter: Adapter, channel: str, load_device: torch.device):
        self.channel = channel
        self.lora_branches = adapter.lora_branches.patcher(load_device)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        scales = token_scales(context, self.channel)
        return {} if scales is None else self.lora_branches.model.forward_wrappers(scales)


def apply_stlora(model: ModelPatcher, adapter: Adapter, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that obeys the span strengths of its conds through `adapter`.

    Without strengths, or with all of them at 1, the model is computed as if the adapter were not there.
    Raises SliderError when the adapter is no STLoRA or does not fit the model.
    """
    family = family_of(model)
    if adapter.adapter_type != "STLoRA":
        raise SliderError(
            f"{adapter.name} is a GSTLoRA (it also changes layers without prompt tokens), so it cannot act on single "
            "words; expected an STLoRA file such as selective_lora.pt. Use 'Apply GSTLoRA' for it."
        )
    adapter.check_fit(model, family)
    return add_patch(model, STLoRAPatch(adapter, channel, model.load_device))
