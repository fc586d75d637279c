"""The network inside ComfyUI's model objects."""

from __future__ import annotations

from typing import Any


def diffusion_model_of(base_model: object) -> Any:
    """The diffusion model of a comfy.model_base.BaseModel, out of torch.compile's wrapper; None if it has none."""
    inner = getattr(base_model, "diffusion_model", None)
    return getattr(inner, "_orig_mod", inner)
