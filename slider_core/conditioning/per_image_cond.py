"""Tensors that travel with a cond, with one row per image of the batch."""

from __future__ import annotations

from typing import Any

from comfy.conds import CONDRegular

from ..errors import SliderError


class PerImageCond(CONDRegular):
    """A tensor of shape (1 or images, ...). Refuses a batch that its strengths do not fit."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> CONDRegular:
        check_batch(self.cond.shape[0], batch_size)
        return super().process_cond(batch_size, **kwargs)


def check_batch(strengths: int, images: int) -> None:
    """Raise SliderError for a batch that a number of strengths does not fit."""
    if strengths not in (1, images):
        raise SliderError(
            f"{strengths} strengths were given, but the batch has {images} image(s); expected one strength per "
            "image. Use 'Latent for Sweep' to make the latent batch as long as the list."
        )
