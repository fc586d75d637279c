"""GSTLoRA (Global STLoRA): an adapter with one strength for the whole prompt.

    z' = W z + (1 - s) * scale * B A z

W: each target linear; z: any of its inputs. B, A: the adapter's low-rank weights, trained to suppress the edit. scale:
LoRA alpha / rank. s: strength, one value for the batch or one per image.

Source: SliderEdit, arXiv 2511.09715, section on GSTLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from .. import keys
from ..conditioning.outside_strength import current_outside_strength
from ..conditioning.per_image_cond import check_batch
from ..families import family_of
from ..patching.forward_patches import BatchSlice, ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch
from ..strength import suppression, validate_strengths
from .adapter_file import Adapter


class GSTLoRAPatch(ModelPatch):
    """Adds the adapter's LoRA branches, weighted by 1 - strength.

    Where a cond has an outside strength (see conditioning/outside_strength.py), that replaces the strength.
    """

    phase = Phase.ADD
    branch_patcher: ModelPatcher
    batch_independent = True

    def __init__(self, adapter: Adapter, strength: object, load_device: torch.device):
        values = validate_strengths(strength, "strength")
        self.suppression = suppression(values, len(values))
        self.branch_patcher = adapter.lora_branches.patcher(load_device)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        outside = current_outside_strength(context)
        weight = self.suppression if outside is None else suppression((outside,), 1)
        if not weight.any():
            return {}
        weight = weight.to(context.device)
        if len(weight) == 1:
            return self.branch_patcher.model.forward_wrappers(weight[0])
        whole_batch = BatchSlice(0, context.num_images, context.num_images)
        start, end, batch_size = context.inputs.transformer_options.get(keys.BATCH_SLICE, whole_batch)
        check_batch(len(weight), batch_size)
        return self.branch_patcher.model.forward_wrappers(weight[start:end].repeat(context.num_conds))


def apply_gstlora(model: ModelPatcher, adapter: Adapter, strength: object) -> ModelPatcher:
    """A clone of `model` whose edits have `strength`: a number, or one number per image of the batch.

    At strength 1 the result is that of the model without the adapter.
    Raises SliderError for invalid strengths, adapters that are not GSTLoRAs or do not fit the model, and unsupported
    models; when sampling, for a number of strengths that does not match the batch.
    """
    family = family_of(model)
    adapter.require_type("GSTLoRA")
    adapter.check_fit(model, family)
    return add_patch(model, GSTLoRAPatch(adapter, strength, model.load_device))
