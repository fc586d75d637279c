"""GSTLoRA: one strength for the whole instruction (SliderEdit, 'GSTLoRA')."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from .. import keys
from ..conditioning.outside_strength import current_outside_strength
from ..conditioning.per_image_cond import check_batch
from ..errors import SliderError
from ..families import family_of
from ..patching.forward_patches import BatchSlice, ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch
from ..strength import suppression, validate_strengths
from .adapter_file import Adapter


class GSTLoRAPatch(ModelPatch):
    """Operation: z' = W z + (1 - strength) * B A z on every target layer, strength per image of the batch.

    A cond can say where it does not hold (where_and_when.py).
    """

    phase = Phase.ADD
    lora_branches: ModelPatcher
    batch_independent = True

    def __init__(self, adapter: Adapter, strength: object, load_device: torch.device):
        values = validate_strengths(strength, "strength")
        self.alpha = suppression(values, len(values))
        self.lora_branches = adapter.lora_branches.patcher(load_device)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        outside = current_outside_strength(context)
        alpha = self.alpha if outside is None else suppression((outside,), 1)
        if not alpha.any():
            return {}
        alpha = alpha.to(context.device)
        if len(alpha) == 1:
            return self.lora_branches.model.forward_wrappers(alpha[0])
        whole_batch = BatchSlice(0, context.num_images, context.num_images)
        start, end, batch_size = context.inputs.transformer_options.get(keys.BATCH_SLICE, whole_batch)
        check_batch(len(alpha), batch_size)
        return self.lora_branches.model.forward_wrappers(alpha[start:end].repeat(context.num_conds))


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
