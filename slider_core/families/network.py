"""Access to the network inside ComfyUI's model objects."""

from __future__ import annotations

from typing import Any


def diffusion_model_of(base_model: object) -> Any:
    """The network of a comfy.model_base.BaseModel, unwrapped from torch.compile; None if there is none."""
    inner = getattr(base_model, "diffusion_model", None)
    return getattr(inner, "_orig_mod", inner)
