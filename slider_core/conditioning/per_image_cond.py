"""Tensors in `model_conds` with one entry per image of the batch."""

from __future__ import annotations

from typing import Any

from comfy.conds import CONDRegular

from .. import node_names as names
from ..errors import SliderError


class PerImageCond(CONDRegular):
    """A tensor of shape (1 or num_images, ...). Raises SliderError during sampling if the batch size differs.

    content: what the tensor has per image, for the message.
    """

    content = "strengths"

    def process_cond(self, batch_size: int, **kwargs: Any) -> CONDRegular:
        check_batch(self.cond.shape[0], batch_size, self.content)
        return super().process_cond(batch_size, **kwargs)


class MaskBatchCheck(PerImageCond):
    """A tensor that nothing reads, so that a batch is refused if per-image masks do not fit it."""

    content = "masks"


def check_batch(num_values: int, num_images: int, content: str = "strengths") -> None:
    """Raise SliderError unless there is one value, or one per image of the batch. content: what the values are."""
    if num_values not in (1, num_images):
        raise SliderError(
            f"There are {num_values} {content} for a batch of {num_images} image(s); expected one, or one per image. "
            f"Use '{names.REPEAT_LATENT_FOR_SWEEP}' to make the batch as long as the list of strengths."
        )
