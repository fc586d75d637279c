"""Trainable modules: the LoRA of an adapter and the network of a strength projector.

The LoRA branches are those of slider_core, with gradients, so training computes exactly what the nodes compute.
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

from .frozen_model import FrozenModel

_STRENGTH_WIDTH = 768
_NUM_LAYERS = 4

Tensors = dict[str, torch.Tensor]


class TrainableLora(torch.nn.Module):
    """LoRA branches, in float32, for the linears that the model family lists for an adapter type.

    adapter_type: 'STLoRA' or 'GSTLoRA'. Down factors are initialized as in PEFT and up factors to zero, so the model is
    unchanged at first.
    """

    def __init__(self, model: FrozenModel, adapter_type: str, rank: int, seed: int):
        super().__init__()
        self.adapter_type, self.rank, self.family = adapter_type, rank, model.family
        targets = model.family.lora_targets()
        hidden_size = model.family.hidden_size(model.network)
        self.peft_modules: dict[str, list[str]] = {}
        lora_weights: dict[str, list[LoraWeights]] = {}
        for peft_module in model.family.adapter_targets(adapter_type, model.network):
            target = targets[peft_module]
            linear: Any = model.network.get_submodule(target.module)
            out_features = linear.out_features if target.size is None else target.size * hidden_size
            down = _uniform(f"{peft_module}.down", (rank, linear.in_features), 1 / math.sqrt(linear.in_features), seed)
            weights = LoraWeights(target.offset, target.size, down, torch.zeros(out_features, rank), 1.0)
            self.peft_modules.setdefault(target.module, []).append(peft_module)
            lora_weights.setdefault(target.module, []).append(weights)
        self.branches = LoraBranches(lora_weights).requires_grad_().to(model.device)

    def forward_wrappers(self, scale: torch.Tensor) -> Mapping[str, ForwardWrapper]:
        """Wrappers that add scale * up(down(x)). scale: a scalar, or (batch, text tokens) for an STLoRA."""
        return self.branches.forward_wrappers(scale)

    def tensors(self) -> Tensors:
        """Copies of the factors, float32 on the CPU: `<PEFT module>.lora_A.weight`, `<PEFT module>.lora_B.weight`."""
        return {
            f"{peft_module}.lora_{role}.weight": factor.detach().to("cpu", copy=True)
            for peft_module, down, up in self._factors()
            for role, factor in (("A", down), ("B", up))
        }

    def adapter(self, name: str) -> Adapter:
        """A copy of the adapter, as the nodes read it from a file."""
        tensors = self.tensors()
        targets = self.family.lora_targets()
        lora_weights: dict[str, list[LoraWeights]] = {}
        for module, peft_modules in self.peft_modules.items():
            lora_weights[module] = [
                LoraWeights(
                    targets[peft_module].offset,
                    targets[peft_module].size,
                    tensors[f"{peft_module}.lora_A.weight"],
                    tensors[f"{peft_module}.lora_B.weight"],
                    1.0,
                )
                for peft_module in peft_modules
            ]
        return Adapter(name, self.adapter_type, self.family, lora_weights)

    def _factors(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(PEFT module, down, up) for each one; the down factors of modules in one linear are a single parameter."""
        branches: Any = self.branches.branches
        for module, branch in zip(self.branches.paths, branches):
            downs = branch.down.weight.split(branch.ranks)
            for peft_module, down, up in zip(self.peft_modules[module], downs, branch.ups):
                yield peft_module, down, up.weight


class TrainableProjector(torch.nn.Module):
    """The MLP that maps a strength and the pooled text to offsets of the text modulation (Kontinuous Kontext, 3)."""

    def __init__(self, model: FrozenModel, seed: int):
        super().__init__()
        pooled_width = model.family.pooled_width(model.network)
        width = 2 * model.family.hidden_size(model.network)
        self.paths = model.family.text_modulations(model.network)
        sizes = [(_STRENGTH_WIDTH, 2), (width, _STRENGTH_WIDTH + pooled_width), *[(width, width)] * (_NUM_LAYERS - 1)]
        names = ["pe_extender", *(f"projector.{2 * k}" for k in range(_NUM_LAYERS))]
        self.names = names
        self.weights = torch.nn.ParameterList(
            _uniform(f"{name}.weight", size, 1 / math.sqrt(size[1]), seed) for name, size in zip(names, sizes)
        )
        self.biases = torch.nn.ParameterList(
            _uniform(f"{name}.bias", size[:1], 1 / math.sqrt(size[1]), seed) for name, size in zip(names, sizes)
        )
        self.to(model.device)

    @property
    def projector(self) -> StrengthProjector:
        """slider_core's network with these parameters (shared, not copied)."""
        extender, *layers = zip(self.weights, self.biases)
        return StrengthProjector("in training", extender, tuple(layers))

    def forward_wrappers(
        self, strengths: Sequence[float], pooled: torch.Tensor, dropped: Sequence[bool]
    ) -> Mapping[str, ForwardWrapper]:
        """Wrappers that add the offsets for each sample's strength, and nothing where the strength is dropped."""
        offsets = self.projector.offsets(tuple(strengths), pooled)
        kept = torch.tensor([not drop for drop in dropped], device=offsets.device)
        return modulation_offsets(self.paths, offsets * kept[:, None])

    def tensors(self) -> Tensors:
        """Copies of the parameters, float32 on the CPU, with the names of the authors' file."""
        layers = zip(self.names, self.weights, self.biases)
        return {
            f"{name}.{role}": value.detach().to("cpu", copy=True)
            for name, weight, bias in layers
            for role, value in (("weight", weight), ("bias", bias))
        }


def _uniform(name: str, shape: Sequence[int], limit: float, seed: int) -> torch.Tensor:
    """Uniform in [-limit, limit], seeded by the name and the seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1_000_003 * seed)
    return torch.empty(*shape).uniform_(-limit, limit, generator=generator)
