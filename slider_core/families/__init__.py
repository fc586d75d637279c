"""Differences between model families, one file per family.

To add a family, implement `Family` in a new file and list an instance in FAMILIES.
"""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..errors import SliderError
from .base import Block, Family, LinearSlice
from .flux import Flux
from .network import diffusion_model_of

FAMILIES: tuple[Family, ...] = (Flux(),)

__all__ = ["FAMILIES", "Block", "Family", "LinearSlice", "family_of", "family_of_encoders"]


def family_of(model: ModelPatcher) -> Family:
    """The family of a loaded model.

    Raises SliderError for runtimes that ignore ComfyUI's patches, and for unsupported architectures.
    """
    network = diffusion_model_of(model.model)
    for family in FAMILIES:
        if family.matches(network):
            return family
    network_type = type(network if network is not None else model.model)
    supported = ", ".join(family.name for family in FAMILIES)
    if not network_type.__module__.startswith("comfy."):
        raise SliderError(
            f"The model runs in {network_type.__module__}.{network_type.__name__}, which ignores ComfyUI's patches, so "
            f"sliders would have no effect; expected ComfyUI's own implementation of {supported}. Load the model with "
            "'Load Diffusion Model' or a GGUF loader."
        )
    raise SliderError(
        f"Sliders do not support this model ({type(model.model).__name__} in ComfyUI); expected {supported}. "
        "Load a supported model."
    )


def family_of_encoders(encoders: set[str]) -> Family:
    """The family that uses this set of text encoders (ComfyUI's attribute names). Raises SliderError if none does."""
    for family in FAMILIES:
        if family.text_encoders == encoders:
            return family
    expected = "; ".join(f"{' + '.join(sorted(f.text_encoders))} ({f.name})" for f in FAMILIES)
    raise SliderError(
        f"This CLIP has the text encoders {' + '.join(sorted(encoders)) or '(none recognized)'}; expected {expected}. "
        "Load it with 'Load CLIP (Dual)' (DualCLIPLoader) and type 'flux'."
    )
