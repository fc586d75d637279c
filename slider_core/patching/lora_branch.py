"""Low-rank adapters beside a linear: y + weight * up(down(x)), never merged into its weights.

Merging into fp8 weights rounds the adapter away and every new strength would re-patch the model; a side path does
neither, and works on any weight format because it needs only the linear's input and output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from comfy import ops
from comfy.model_management import unet_offload_device
from comfy.model_patcher import ModelPatcher

from .forward_patches import Forward, ForwardWrapper


class LoraWeights(NamedTuple):
    """A low-rank update of some output rows of one linear.

    offset, size: rows in units of the model's width (`size` None: all rows), so that they are known from names alone.
    down: (rank, in); up: (rows, rank); scale: multiplies the product (alpha / rank).
    """

    offset: int
    size: int | None
    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def first_row(self) -> int:
        return 0 if self.size is None else self.offset * (self.up.shape[0] // self.size)


class LoraBranch(torch.nn.Module):
    """All factors of one linear; `down` is shared so that fused qkv costs one product."""

    def __init__(self, lora_weights: Sequence[LoraWeights]):
        super().__init__()
        self.down = _linear(torch.cat([f.down for f in lora_weights]))
        self.ups = torch.nn.ModuleList(_linear(f.up * f.scale if f.scale != 1 else f.up) for f in lora_weights)
        self.rows = [slice(f.first_row, f.first_row + f.up.shape[0]) for f in lora_weights]
        self.ranks = [f.down.shape[0] for f in lora_weights]

    def forward(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add weight * up(down(x)) to `y` in place and return it.

        x: (batch, ..., in), y: (batch, ..., out), weight: a scalar, (batch,) or (batch, rows).
        """
        low = self.down(x)
        low = low * weight.to(low.dtype).reshape(weight.shape + (1,) * (low.ndim - weight.ndim))
        for up, rows, part in zip(self.ups, self.rows, low.split(self.ranks, dim=-1)):
            y[..., rows] += up(part)
        return y


class LoraBranches(torch.nn.Module):
    """The side paths of one adapter, keyed by module path of the model they stand beside."""

    def __init__(self, lora_weights: Mapping[str, Sequence[LoraWeights]]):
        super().__init__()
        self.lora_weights = lora_weights
        paths = {name: LoraBranch(f) for name, f in lora_weights.items()}
        self.paths = torch.nn.ModuleList(paths.values())
        self.names = list(paths)
        self._patchers: dict[torch.device, ModelPatcher] = {}
        self.requires_grad_(False)

    def forward_wrappers(self, weight: torch.Tensor) -> dict[str, ForwardWrapper]:
        """Overrides for all modules, with the weight of LoraBranch.forward."""
        return {name: _add_branch(path, weight) for name, path in zip(self.names, self.paths)}

    def patcher(self, load_device: torch.device) -> ModelPatcher:
        """The ModelPatcher by which ComfyUI loads and offloads the side paths.

        It lives as long as this module: ComfyUI falls back from a clone that has gone to the patcher it was cloned
        from, and collects garbage, slowly, when that is gone too.
        """
        if load_device not in self._patchers:
            patcher = ModelPatcher(self, load_device, unet_offload_device())
            patcher.cached_patcher_init = (_fresh_patcher, (self, load_device))
            self._patchers[load_device] = patcher
        return self._patchers[load_device]


def _fresh_patcher(side: LoraBranches, load_device: torch.device) -> ModelPatcher:
    """What ComfyUI asks for to put the side paths on a further GPU: a side model of its own."""
    return LoraBranches(side.lora_weights).patcher(load_device)


def _add_branch(path: torch.nn.Module, weight: torch.Tensor) -> ForwardWrapper:
    def wrap(forward: Forward) -> Forward:
        def with_side_path(x: torch.Tensor) -> torch.Tensor:
            return path(forward(x), x, weight)

        return with_side_path

    return wrap


def _linear(weight: torch.Tensor) -> torch.nn.Module:
    linear = ops.manual_cast.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
