"""STLoRA: an adapter that acts on chosen tokens only, each with its own scale (SliderEdit, 'STLoRA')."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher

from ..conditioning.span_strengths import DEFAULT_CHANNEL, row_scales
from ..errors import SliderError
from ..families import family_of
from ..patching.forward_patches import Around, ModelCall, Operation, add_operation
from .adapter_file import Adapter


class SelectiveLora(Operation):
    """Operation: z' = W z + scale[token] * B A z on the text stream, scale from the conds of each call."""

    side_model: ModelPatcher
    image_by_image = True

    def __init__(self, adapter: Adapter, channel: str, load_device: torch.device):
        self.channel = channel
        self.side_model = adapter.side_model.patcher(load_device)

    def around(self, call: ModelCall) -> Mapping[str, Around]:
        scales = row_scales(call, self.channel)
        return {} if scales is None else self.side_model.model.around(scales)


def apply_stlora(model: ModelPatcher, adapter: Adapter, channel: str = DEFAULT_CHANNEL) -> ModelPatcher:
    """A clone of `model` that obeys the span strengths of its conds through `adapter`.

    Without strengths, or with all of them at 1, the model is computed as if the adapter were not there.
    Raises SliderError when the adapter is no STLoRA or does not fit the model.
    """
    family = family_of(model)
    if adapter.kind != "STLoRA":
        raise SliderError(
            f"{adapter.name} is a GSTLoRA (it also changes layers without prompt tokens), so it cannot act on single "
            "words; expected an STLoRA file such as selective_lora.pt. Use 'Apply GSTLoRA' for it."
        )
    adapter.check_fit(model, family)
    return add_operation(model, SelectiveLora(adapter, channel, model.load_device))
