"""Tensors in `model_conds` with one entry per image of the batch."""

from __future__ import annotations

from typing import Any

import torch
from comfy.conds import CONDRegular

from .. import node_names as names
from ..errors import SliderError


class PerImageCond(CONDRegular):
    """A tensor of shape (1 or num_images, ...). Refuses batches of another size, by SliderError when sampling."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> CONDRegular:
        check_batch(self.cond.shape[0], batch_size)
        return super().process_cond(batch_size, **kwargs)


def batch_size_check(num_images: int) -> PerImageCond:
    """A cond that nothing reads, for ComfyUI to refuse a batch of another size (see keys.BATCH_SIZE_CHECK)."""
    return PerImageCond(torch.zeros(num_images, 1))


def check_batch(num_strengths: int, num_images: int) -> None:
    """Raise SliderError unless there is one strength, or one per image of the batch."""
    if num_strengths not in (1, num_images):
        raise SliderError(
            f"There are {num_strengths} strengths for a batch of {num_images} image(s); expected one strength per "
            f"image. Use '{names.REPEAT_LATENT_FOR_SWEEP}' to make the batch as long as the list of strengths."
        )
