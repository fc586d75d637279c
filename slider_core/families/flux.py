"""FLUX.1: dev, Kontext, Fill and schnell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from comfy.ldm.flux.math import apply_rope, apply_rope1
from comfy.ldm.flux.model import Flux as FluxModel
from comfy.text_encoders.flux import FluxTokenizer
from comfy.utils import flux_to_diffusers

from .base import Block, Family, LinearSlice

_MAX_DEPTH = 64  # number of double and of single blocks whose names are recognized
_PATCH = 2  # latent pixels per token, horizontally and vertically
_TEXT_TARGETS = (
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
_QKV_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v")
_IMAGE_TARGETS = (*_QKV_TARGETS, "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
_ADAPTER_TARGETS = {  # of each double block, of each single block; as in SliderEdit's released adapters
    "STLoRA": (_TEXT_TARGETS, ()),
    "GSTLoRA": ((*_IMAGE_TARGETS, *_TEXT_TARGETS), _QKV_TARGETS),
}
_INPLACE_MODIFIED_IN_DOUBLE = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
_TEXT_STREAM = re.compile(r"double_blocks\.\d+\.txt_(attn\.(qkv|proj)|mlp\.[02])")


class Flux(Family):
    name = "FLUX.1"
    text_encoders = frozenset({"clip_l", "t5xxl"})
    context_encoder = "t5xxl"
    fingerprint_parameter = "img_in.bias"
    vital_layers = (0, 1, 2, 17, 18, 25, 28, 53, 54, 56)  # Stable Flow, section 3, for FLUX.1-dev

    def matches(self, diffusion_model: object) -> bool:
        return isinstance(diffusion_model, FluxModel) and not diffusion_model.params.global_modulation

    def lora_targets(self) -> dict[str, LinearSlice]:
        return _targets()

    def acts_on_text_only(self, module: str) -> bool:
        return _TEXT_STREAM.fullmatch(module) is not None

    def tokenizer(self, embedding_directories: Sequence[str]) -> FluxTokenizer:
        return FluxTokenizer(embedding_directory=list(embedding_directories))

    def hidden_size(self, diffusion_model: Any) -> int:
        return diffusion_model.hidden_size

    def pooled_width(self, diffusion_model: Any) -> int:
        return diffusion_model.params.vec_in_dim

    def text_modulations(self, diffusion_model: Any) -> list[str]:
        return [f"double_blocks.{k}.txt_mod" for k in range(len(diffusion_model.double_blocks))]

    def text_qkv(self, diffusion_model: Any) -> list[str]:
        return [
            *(f"double_blocks.{k}.txt_attn.qkv" for k in range(len(diffusion_model.double_blocks))),
            *(f"single_blocks.{k}.linear1" for k in range(len(diffusion_model.single_blocks))),
        ]

    def blocks(self, diffusion_model: Any) -> list[Block]:
        double = [f"double_blocks.{k}" for k in range(len(diffusion_model.double_blocks))]
        single = [f"single_blocks.{k}" for k in range(len(diffusion_model.single_blocks))]
        return [
            *(Block(path, f"{path}.img_attn.qkv", False, _identity_double) for path in double),
            *(Block(path, f"{path}.linear1", True, _identity_single) for path in single),
        ]

    def image_grid(self, latent_shape: Sequence[int]) -> tuple[int, int]:
        return math.ceil(latent_shape[-2] / _PATCH), math.ceil(latent_shape[-1] / _PATCH)

    def block_index_of(self, options: Mapping[str, Any], diffusion_model: Any) -> int:
        first = len(diffusion_model.double_blocks) if options["block_type"] == "single" else 0
        return first + options["block_index"]

    def adapter_targets(self, adapter_type: str, diffusion_model: Any) -> list[str]:
        double, single = _ADAPTER_TARGETS[adapter_type]
        return [
            *(f"transformer_blocks.{k}.{name}" for k in range(len(diffusion_model.double_blocks)) for name in double),
            *(
                f"single_transformer_blocks.{k}.{name}"
                for k in range(len(diffusion_model.single_blocks))
                for name in single
            ),
        ]

    def inplace_modified_inputs(self, diffusion_model: Any) -> list[str]:
        doubles, singles = range(len(diffusion_model.double_blocks)), range(len(diffusion_model.single_blocks))
        return [
            *(f"double_blocks.{k}.{norm}" for k in doubles for norm in _INPLACE_MODIFIED_IN_DOUBLE),
            *(f"single_blocks.{k}.pre_norm" for k in singles),
            "final_layer.norm_final",
        ]

    def block_output_linears(self, diffusion_model: Any) -> list[str]:
        doubles, singles = range(len(diffusion_model.double_blocks)), range(len(diffusion_model.single_blocks))
        return [
            *(f"double_blocks.{k}.{mlp}.2" for k in doubles for mlp in ("img_mlp", "txt_mlp")),
            *(f"single_blocks.{k}.linear2" for k in singles),
        ]

    def velocity(
        self,
        diffusion_model: Any,
        latent: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        guidance: torch.Tensor,
        references: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        options = {"patches": {"attn1_patch": [_rope_patch]}} if torch.is_grad_enabled() else {}
        return diffusion_model(
            latent,
            sigma,
            text,
            pooled,
            guidance,
            list(references) or None,
            transformer_options=options,
            ref_latents_method="offset",
        )

    def apply_rope(
        self, queries: torch.Tensor, keys: torch.Tensor, positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return apply_rope(queries, keys, positions)


class _Rope(torch.autograd.Function):
    """ComfyUI's rotary embedding with a backward that rotates back, instead of autograd's zero-filling and adding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(positions)
        return apply_rope1(x, positions)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        [positions] = ctx.saved_tensors
        return apply_rope1(gradient, positions.transpose(-1, -2)), None


def _rope_patch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pe: torch.Tensor, **_: Any) -> dict[str, Any]:
    """An attention patch that applies the rotary embedding, which attention then skips."""
    return {"q": _Rope.apply(q, pe), "k": _Rope.apply(k, pe), "pe": None}


def _identity_double(img: torch.Tensor, txt: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return img, txt


def _identity_single(x: torch.Tensor, **_: Any) -> torch.Tensor:
    return x


@cache
def _targets() -> dict[str, LinearSlice]:
    config = {"depth": _MAX_DEPTH, "depth_single_blocks": _MAX_DEPTH, "hidden_size": 1}
    targets: dict[str, LinearSlice] = {}
    for name, target in flux_to_diffusers(config).items():
        if not name.endswith(".weight") or (isinstance(target, tuple) and len(target) > 2):
            continue
        path, feature_slice = target if isinstance(target, tuple) else (target, None)
        module = path.removesuffix(".weight")
        _, offset, size = feature_slice or (0, 0, None)
        targets[name.removesuffix(".weight")] = LinearSlice(module, offset, size)
        targets[module] = LinearSlice(module)
    for block in range(_MAX_DEPTH):
        targets[f"single_blocks.{block}.linear1_qkv"] = LinearSlice(f"single_blocks.{block}.linear1", 0, 3)
    return targets
