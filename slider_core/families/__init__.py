"""What differs between model families, one file per family. To add one, write its file and list it in FAMILIES."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..errors import SliderError
from .base import Block, Family, LinearSlice
from .flux import Flux
from .network import diffusion_model_of

FAMILIES: tuple[Family, ...] = (Flux(),)

__all__ = ["FAMILIES", "Block", "Family", "LinearSlice", "family_of", "family_of_encoders"]


def family_of(model: ModelPatcher) -> Family:
    """The family of a loaded model. Raises SliderError for runtimes that ignore patches and unknown architectures."""
    inner = diffusion_model_of(model.model)
    for family in FAMILIES:
        if family.matches(inner):
            return family
    kind = type(inner if inner is not None else model.model)
    known = ", ".join(family.name for family in FAMILIES)
    if not kind.__module__.startswith("comfy."):
        raise SliderError(
            f"The model runs in {kind.__module__}.{kind.__name__}, which ignores ComfyUI's patches, so sliders would "
            f"do nothing; expected ComfyUI's own {known}. Load the model with 'Load Diffusion Model' or a GGUF loader."
        )
    raise SliderError(
        f"Sliders are not known for this model ({type(model.model).__name__} in ComfyUI); expected {known}. "
        "Load one of these models."
    )


def family_of_encoders(encoders: set[str]) -> Family:
    """The family whose text comes from this set of encoders. Raises SliderError when no family fits."""
    for family in FAMILIES:
        if family.text_encoders == encoders:
            return family
    wanted = "; ".join(f"{' + '.join(sorted(f.text_encoders))} ({f.name})" for f in FAMILIES)
    raise SliderError(
        f"This CLIP has the text encoders {' + '.join(sorted(encoders)) or 'none known'}; expected {wanted}. "
        "Load it with 'DualCLIPLoader', type flux."
    )
