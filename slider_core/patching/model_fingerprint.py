"""A fingerprint of a model, so that what was made with one model is not used with another."""

from __future__ import annotations

from typing import NamedTuple

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ..errors import SliderError
from ..families import family_of
from ..families.network import diffusion_model_of

_MAX_DIFFERING = 0.05
"""Fraction of the values that may differ by rounding between two precisions of one model."""


class ModelFingerprint(NamedTuple):
    """A model's family and the values of one small parameter, without LoRAs."""

    family: str
    values: torch.Tensor

    def check(self, model: ModelPatcher, what: str) -> None:
        """Raise SliderError unless `model` is the same model, in any precision. what: what was made with it."""
        other = fingerprint_of(model)
        if other.family != self.family or other.values.shape != self.values.shape:
            raise SliderError(
                f"{what} was made with another model ({self.family}, {len(self.values)} wide; this one is "
                f"{other.family}, {len(other.values)} wide). Load that model, or create it again with this one."
            )
        coarser = max(self.values.dtype, other.values.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        one, two = (values.to(coarser).float() for values in (self.values, other.values))
        if (one != two).float().mean() > _MAX_DIFFERING:
            raise SliderError(
                f"{what} was made with a different {self.family} model. Load that model, or create it again with this "
                "one."
            )


def fingerprint_of(model: ModelPatcher) -> ModelFingerprint:
    """The fingerprint of a loaded model. Raises SliderError for a model of unknown family."""
    family = family_of(model)
    unpatched = model.backup.get(f"diffusion_model.{family.fingerprint_parameter}")
    if unpatched:
        values = unpatched.weight
    else:
        values = comfy.utils.get_attr(diffusion_model_of(model.model), family.fingerprint_parameter)
    return ModelFingerprint(family.name, values.detach().to("cpu", copy=True))
