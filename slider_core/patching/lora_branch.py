"""LoRA weights as an unmerged branch next to a linear: y + multiplier * scale * up(down(x)), scale = alpha / rank.

Merging into fp8 weights rounds the LoRA away, and every new strength would patch the whole model again. A branch does
neither, and it works with any weight format because it needs only the linear's input and output.
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
    """A low-rank update of a slice of one linear's output features.

    offset, size: output features [offset * hidden, (offset + size) * hidden); size None: all of them. In units of the
        model's hidden size, so that they follow from module names alone.
    down: (rank, in_features). up: (out_features of the slice, rank). scale: lora_alpha / rank.
    """

    offset: int
    size: int | None
    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def first_feature(self) -> int:
        return 0 if self.size is None else self.offset * (self.up.shape[0] // self.size)


class LoraBranch(torch.nn.Module):
    """All LoRA weights of one linear. The down projections are one matrix, so that fused QKV costs one product."""

    def __init__(self, lora_weights: Sequence[LoraWeights]):
        super().__init__()
        self.down = _linear(torch.cat([w.down for w in lora_weights]))
        self.ups = torch.nn.ModuleList(_linear(w.up * w.scale if w.scale != 1 else w.up) for w in lora_weights)
        self.features = [slice(w.first_feature, w.first_feature + w.up.shape[0]) for w in lora_weights]
        self.ranks = [w.down.shape[0] for w in lora_weights]

    def forward(self, y: torch.Tensor, x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        """Add multiplier * scale * up(down(x)) to `y` in place and return it.

        x: (batch, ..., in_features). y: (batch, ..., out_features). multiplier: a scalar, (batch,) or (batch, tokens).
        """
        low = self.down(x)
        low = low * multiplier.to(low.dtype).reshape(multiplier.shape + (1,) * (low.ndim - multiplier.ndim))
        for up, features, low_part in zip(self.ups, self.features, low.split(self.ranks, dim=-1)):
            y[..., features] += up(low_part)
        return y


class LoraBranches(torch.nn.Module):
    """The LoRA branches of one adapter, by path of the linear in the diffusion model."""

    def __init__(self, lora_weights: Mapping[str, Sequence[LoraWeights]]):
        super().__init__()
        self.lora_weights = lora_weights
        branches = {path: LoraBranch(weights) for path, weights in lora_weights.items()}
        self.branches = torch.nn.ModuleList(branches.values())
        self.paths = list(branches)
        self._patchers: dict[torch.device, ModelPatcher] = {}
        self.requires_grad_(False)

    def forward_wrappers(self, multiplier: torch.Tensor) -> dict[str, ForwardWrapper]:
        """Wrappers that add every branch to its linear, with a multiplier as in LoraBranch.forward."""
        return {path: _add_branch(branch, multiplier) for path, branch in zip(self.paths, self.branches)}

    def patcher(self, load_device: torch.device) -> ModelPatcher:
        """The ModelPatcher by which ComfyUI loads and offloads the branches.

        Kept alive with this module: if the parent of a clone is garbage-collected, ComfyUI cannot fall back to it and
        runs an expensive garbage collection instead.
        """
        if load_device not in self._patchers:
            patcher = ModelPatcher(self, load_device, unet_offload_device())
            patcher.cached_patcher_init = (_new_patcher, (self, load_device))
            self._patchers[load_device] = patcher
        return self._patchers[load_device]


def _new_patcher(branches: LoraBranches, load_device: torch.device) -> ModelPatcher:
    """ComfyUI calls it to put the branches on another GPU, with modules of their own."""
    return LoraBranches(branches.lora_weights).patcher(load_device)


def _add_branch(branch: torch.nn.Module, multiplier: torch.Tensor) -> ForwardWrapper:
    def wrap(forward: Forward) -> Forward:
        def with_branch(x: torch.Tensor) -> torch.Tensor:
            return branch(forward(x), x, multiplier)

        return with_branch

    return wrap


def _linear(weight: torch.Tensor) -> torch.nn.Module:
    linear = ops.manual_cast.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
