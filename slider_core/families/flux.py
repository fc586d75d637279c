"""FLUX.1: dev, Kontext, Fill, schnell."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from comfy.ldm.flux.model import Flux as FluxModel
from comfy.utils import flux_to_diffusers

from .base import Family, Target

_DEPTH = 64
_TEXT_STREAM = re.compile(r"double_blocks\.\d+\.txt_(attn\.(qkv|proj)|mlp\.[02])")


class Flux(Family):
    name = "FLUX.1"
    text_encoders = frozenset({"clip_l", "t5xxl"})
    text_rows = "t5xxl"

    def owns(self, diffusion_model: object) -> bool:
        return isinstance(diffusion_model, FluxModel) and not diffusion_model.params.global_modulation

    def targets(self) -> dict[str, Target]:
        return _targets()

    def acts_on_text_only(self, module: str) -> bool:
        return _TEXT_STREAM.fullmatch(module) is not None

    def width(self, diffusion_model: Any) -> int:
        return diffusion_model.hidden_size

    def text_modulations(self, diffusion_model: Any) -> list[str]:
        return [f"double_blocks.{k}.txt_mod" for k in range(len(diffusion_model.double_blocks))]


@cache
def _targets() -> dict[str, Target]:
    config = {"depth": _DEPTH, "depth_single_blocks": _DEPTH, "hidden_size": 1}
    targets: dict[str, Target] = {}
    for name, place in flux_to_diffusers(config).items():
        if not name.endswith(".weight") or (isinstance(place, tuple) and len(place) > 2):
            continue
        path, rows = place if isinstance(place, tuple) else (place, None)
        module = path.removesuffix(".weight")
        _, offset, size = rows or (0, 0, None)
        targets[name.removesuffix(".weight")] = Target(module, offset, size)
        targets[module] = Target(module)
    for block in range(_DEPTH):
        targets[f"single_blocks.{block}.linear1_qkv"] = Target(f"single_blocks.{block}.linear1", 0, 3)
    return targets
