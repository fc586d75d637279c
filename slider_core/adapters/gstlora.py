"""GSTLoRA: one strength for the whole instruction (SliderEdit, 'GSTLoRA')."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.outside_strength import strength_elsewhere
from ..errors import SliderError
from ..families import family_of
from ..patching.forward_patches import PART, Around, ModelCall, Operation, Part, add_operation
from ..strength import read_strength, suppression
from .adapter_file import Adapter


class GlobalLora(Operation):
    """Operation: z' = W z + (1 - strength) * B A z on every target layer, strength per image of the batch.

    A cond can say where it does not hold (where_and_when.py).
    """

    side_model: ModelPatcher
    image_by_image = True

    def __init__(self, adapter: Adapter, strength: object, load_device: torch.device):
        values = read_strength(strength, "strength")
        self.alpha = suppression(values, len(values))
        self.side_model = adapter.side_model.patcher(load_device)

    def around(self, call: ModelCall) -> Mapping[str, Around]:
        elsewhere = strength_elsewhere(call)
        alpha = self.alpha if elsewhere is None else suppression((elsewhere,), 1)
        if not alpha.any():
            return {}
        alpha = alpha.to(call.device)
        if len(alpha) == 1:
            return self.side_model.model.around(alpha[0])
        part = call.inputs.options.get(PART, Part(0, call.images, call.images))
        if len(alpha) != part.images:
            raise SliderError(
                f"{len(alpha)} strengths were given, but the batch has {part.images} image(s); expected one strength "
                "per image. Use 'Latent for Sweep' to make the latent batch as long as the list."
            )
        return self.side_model.model.around(alpha[part.start : part.end].repeat(call.count))


def apply_gstlora(model: ModelPatcher, adapter: Adapter, strength: object) -> ModelPatcher:
    """A clone of `model` whose edits have `strength`: a number, or one per image of the batch.

    At 1 the model is computed as if the adapter were not there.
    Raises SliderError for a bad strength, an STLoRA file, or an adapter that does not fit the model.
    """
    family = family_of(model)
    if adapter.kind != "GSTLoRA":
        raise SliderError(
            f"{adapter.name} is an STLoRA (text stream only, trained to act on single words); expected a GSTLoRA file "
            "such as pytorch_lora_weights.safetensors. Use 'Apply STLoRA' for it."
        )
    adapter.check_fit(model, family)
    return add_operation(model, GlobalLora(adapter, strength, model.load_device))
