"""Tensors that travel with a cond, with one row per image of the batch."""

from __future__ import annotations

from typing import Any

from comfy.conds import CONDRegular

from .errors import SliderError


class PerImageCond(CONDRegular):
    """A tensor of shape (1 or images, ...). Refuses a batch that its strengths do not fit."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> CONDRegular:
        images = self.cond.shape[0]
        if images not in (1, batch_size):
            raise SliderError(
                f"{images} strengths were given, but the batch has {batch_size} image(s); expected one strength per "
                "image. Use 'Latent for Sweep' to make the latent batch as long as the list."
            )
        return super().process_cond(batch_size, **kwargs)
