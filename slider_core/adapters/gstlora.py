"""GSTLoRA: one strength for the whole instruction (SliderEdit, 'GSTLoRA')."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.outside_strength import strength_elsewhere
from ..errors import SliderError
from ..families import family_of
from ..patching.forward_patches import BATCH_SLICE, BatchSlice, ForwardContext, ForwardWrapper, ModelPatch, add_patch
from ..strength import suppression, validate_strengths
from .adapter_file import Adapter


class GSTLoRAPatch(ModelPatch):
    """Operation: z' = W z + (1 - strength) * B A z on every target layer, strength per image of the batch.

    A cond can say where it does not hold (where_and_when.py).
    """

    lora_branches: ModelPatcher
    batch_independent = True

    def __init__(self, adapter: Adapter, strength: object, load_device: torch.device):
        values = validate_strengths(strength, "strength")
        self.alpha = suppression(values, len(values))
        self.lora_branches = adapter.lora_branches.patcher(load_device)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        elsewhere = strength_elsewhere(context)
        alpha = self.alpha if elsewhere is None else suppression((elsewhere,), 1)
        if not alpha.any():
            return {}
        alpha = alpha.to(context.device)
        if len(alpha) == 1:
            return self.lora_branches.model.forward_wrappers(alpha[0])
        part = context.inputs.options.get(BATCH_SLICE, BatchSlice(0, context.images, context.images))
        if len(alpha) != part.images:
            raise SliderError(
                f"{len(alpha)} strengths were given, but the batch has {part.images} image(s); expected one strength "
                "per image. Use 'Latent for Sweep' to make the latent batch as long as the list."
            )
        return self.lora_branches.model.forward_wrappers(alpha[part.start : part.end].repeat(context.count))


def apply_gstlora(model: ModelPatcher, adapter: Adapter, strength: object) -> ModelPatcher:
    """A clone of `model` whose edits have `strength`: a number, or one per image of the batch.

    At 1 the model is computed as if the adapter were not there.
    Raises SliderError for a bad strength, an STLoRA file, or an adapter that does not fit the model.
    """
    family = family_of(model)
    if adapter.adapter_type != "GSTLoRA":
        raise SliderError(
            f"{adapter.name} is an STLoRA (text stream only, trained to act on single words); expected a GSTLoRA file "
            "such as pytorch_lora_weights.safetensors. Use 'Apply STLoRA' for it."
        )
    adapter.check_fit(model, family)
    return add_patch(model, GSTLoRAPatch(adapter, strength, model.load_device))
