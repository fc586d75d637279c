"""What learns: the low-rank factors of an adapter and the network of a strength projector.

The factors are slider_core's own side paths with gradients, so training computes what the nodes compute.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from slider_core.adapters.adapter_file import Adapter
from slider_core.adapters.strength_projector import StrengthProjector, modulation_offsets
from slider_core.patching.forward_patches import ForwardWrapper
from slider_core.patching.lora_branch import LoraBranches, LoraWeights

from .frozen_model import BaseModel

_EXTENDED = 768
_LAYERS = 4

Tensors = dict[str, torch.Tensor]


class TrainableLora(torch.nn.Module):
    """Low-rank factors beside the layers that the model's family names for `kind`, in float32.

    kind: 'STLoRA' or 'GSTLoRA'. Down factors start as in PEFT, up factors at zero, so the model is unchanged at first.
    """

    def __init__(self, base: BaseModel, kind: str, rank: int, seed: int):
        super().__init__()
        self.kind, self.rank, self.family = kind, rank, base.family
        targets = base.family.lora_targets()
        width = base.family.hidden_size(base.network)
        self.layers: dict[str, list[str]] = {}
        lora_weights: dict[str, list[LoraWeights]] = {}
        for layer in base.family.adapter_targets(kind, base.network):
            target = targets[layer]
            linear: Any = base.network.get_submodule(target.module)
            rows = linear.out_features if target.size is None else target.size * width
            down = _uniform(f"{layer}.down", (rank, linear.in_features), 1 / math.sqrt(linear.in_features), seed)
            factor = LoraWeights(target.offset, target.size, down, torch.zeros(rows, rank), 1.0)
            self.layers.setdefault(target.module, []).append(layer)
            lora_weights.setdefault(target.module, []).append(factor)
        self.side = LoraBranches(lora_weights).requires_grad_().to(base.device)

    def forward_wrappers(self, weight: torch.Tensor) -> Mapping[str, ForwardWrapper]:
        """Overrides that add weight * up(down(x)): a scalar, or (batch, text rows) for an STLoRA."""
        return self.side.forward_wrappers(weight)

    def tensors(self) -> Tensors:
        """The factors as they are now, float32 on the CPU: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`."""
        return {
            f"{layer}.lora_{role}.weight": factor.detach().to("cpu", copy=True)
            for layer, down, up in self._pairs()
            for role, factor in (("A", down), ("B", up))
        }

    def adapter(self, name: str) -> Adapter:
        """The adapter as the nodes would read it from a file."""
        tensors = self.tensors()
        targets = self.family.lora_targets()
        lora_weights: dict[str, list[LoraWeights]] = {}
        for module, layers in self.layers.items():
            lora_weights[module] = [
                LoraWeights(
                    targets[layer].offset,
                    targets[layer].size,
                    tensors[f"{layer}.lora_A.weight"],
                    tensors[f"{layer}.lora_B.weight"],
                    1.0,
                )
                for layer in layers
            ]
        return Adapter(name, self.kind, self.family, lora_weights)

    def _pairs(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        branches: Any = self.side.branches
        for path, branch in zip(self.side.paths, branches):
            downs = branch.down.weight.split(branch.ranks)
            for layer, down, up in zip(self.layers[path], downs, branch.ups):
                yield layer, down, up.weight


class TrainableProjector(torch.nn.Module):
    """The network that turns a strength into offsets of the text's modulation, in float32 (Kontinuous Kontext, 3)."""

    def __init__(self, base: BaseModel, seed: int):
        super().__init__()
        pooled_width = base.family.pooled_width(base.network)
        width = 2 * base.family.hidden_size(base.network)
        self.paths = base.family.text_modulations(base.network)
        sizes = [(_EXTENDED, 2), (width, _EXTENDED + pooled_width), *[(width, width)] * (_LAYERS - 1)]
        names = ["pe_extender", *(f"projector.{2 * k}" for k in range(_LAYERS))]
        self.names = names
        self.weights = torch.nn.ParameterList(
            _uniform(f"{name}.weight", size, 1 / math.sqrt(size[1]), seed) for name, size in zip(names, sizes)
        )
        self.biases = torch.nn.ParameterList(
            _uniform(f"{name}.bias", size[:1], 1 / math.sqrt(size[1]), seed) for name, size in zip(names, sizes)
        )
        self.to(base.device)

    @property
    def projector(self) -> StrengthProjector:
        """It, as slider_core computes it; shares the parameters."""
        extender, *layers = zip(self.weights, self.biases)
        return StrengthProjector("in training", extender, tuple(layers))

    def forward_wrappers(
        self, strengths: Sequence[float], pooled: torch.Tensor, dropped: Sequence[bool]
    ) -> Mapping[str, ForwardWrapper]:
        """Overrides that add the offsets of each element's strength; none for elements whose strength is dropped."""
        offsets = self.projector.offsets(tuple(strengths), pooled)
        kept = torch.tensor([not drop for drop in dropped], device=offsets.device)
        return modulation_offsets(self.paths, offsets * kept[:, None])

    def tensors(self) -> Tensors:
        """The network as it is now, float32 on the CPU, by the names of the authors' file."""
        layers = zip(self.names, self.weights, self.biases)
        return {
            f"{name}.{part}": value.detach().to("cpu", copy=True)
            for name, weight, bias in layers
            for part, value in (("weight", weight), ("bias", bias))
        }


def _uniform(name: str, shape: Sequence[int], limit: float, seed: int) -> torch.Tensor:
    """Uniform in -limit..limit, by name and seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1_000_003 * seed)
    return torch.empty(*shape).uniform_(-limit, limit, generator=generator)
