"""Slider adapters from disk: the authors' files, PEFT/diffusers, ComfyUI and kohya names.

Kind, rank, family and targets are recognised from the keys alone; whether a model fits is checked when it is applied.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher

from .errors import SliderError
from .families import FAMILIES, Family, Target
from .side_path import Factor, SideModel
from .tensor_file import TensorFile, read_tensors

_ROLES = {
    "down": (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight"),
    "up": (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight"),
    "alpha": (".alpha",),
}
_PREFIXES = (
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)
_PEFT_HEADER = "lora_adapter_metadata"


@dataclass(frozen=True, eq=False)
class Adapter:
    """A recognised adapter.

    kind: 'STLoRA' if it changes nothing but the text stream, so that it can act on single tokens, else 'GSTLoRA'.
    factors: module path in ComfyUI's model -> its low-rank updates.
    """

    name: str
    kind: str
    family: Family
    factors: Mapping[str, list[Factor]]

    @cached_property
    def side_model(self) -> SideModel:
        """The factors as a module, made once and shared by all models they are applied to."""
        return SideModel(self.factors)

    @property
    def ranks(self) -> list[int]:
        return sorted({f.down.shape[0] for parts in self.factors.values() for f in parts})

    def check_fit(self, model: ModelPatcher, family: Family) -> None:
        """Raise SliderError unless every factor has its linear in `model`, of the right size."""
        if family is not self.family:
            raise SliderError(f"{self.name} is for {self.family.name}, but the model is {family.name}.")
        diffusion_model = model.model.diffusion_model
        modules = dict(getattr(diffusion_model, "_orig_mod", diffusion_model).named_modules())
        missing = [name for name in self.factors if not hasattr(modules.get(name), "in_features")]
        if missing:
            raise SliderError(
                f"{self.name} changes {len(missing)} layers that this {family.name} model does not have, such as "
                f"{missing[0]}; expected an adapter trained for this model. Choose the base model it was trained on."
            )
        for name, parts in self.factors.items():
            linear = modules[name]
            for f in parts:
                if (
                    f.down.shape[1] != linear.in_features
                    or f.first_row + f.up.shape[0] > linear.out_features
                    or (f.size is None and f.up.shape[0] != linear.out_features)
                ):
                    raise SliderError(
                        f"{self.name} does not fit the model: at {name} it maps {f.down.shape[1]} to {f.up.shape[0]} "
                        f"values, the model's layer maps {linear.in_features} to {linear.out_features} (hidden size "
                        f"{family.width(diffusion_model)}). Choose the base model it was trained on."
                    )

    def describe(self) -> str:
        """Kind, family, rank, scale and target layers, for people."""
        blocks: dict[str, set[int]] = defaultdict(set)
        parts: dict[str, set[int | None]] = defaultdict(set)
        for module, factors in self.factors.items():
            stack, layer = _split_block(module, blocks)
            parts[f"{stack}.{layer}" if stack else layer].update(None if f.size is None else f.offset for f in factors)
        acts = "on the words you choose" if self.kind == "STLoRA" else "on the whole instruction"
        scales = sorted({round(f.scale, 6) for fs in self.factors.values() for f in fs})
        lines = [
            f"{self.name}: {self.kind}, acts {acts}",
            f"base: {self.family.name}, {len(self.factors)} layers",
            f"rank: {_listed(self.ranks)}; alpha / rank: {_listed(scales)}",
        ]
        for stack, numbers in blocks.items():
            layers = [_layer_name(key, rows) for key, rows in parts.items() if key.startswith(f"{stack}.")]
            lines.append(f"{stack} {min(numbers)}-{max(numbers)}: {', '.join(layers)}")
        lines += [_layer_name(key, rows) for key, rows in parts.items() if key.partition(".")[0] not in blocks]
        return "\n".join(lines)


def read_adapter(path: str | Path) -> Adapter:
    """Read and recognise an adapter file (.safetensors, or a torch file with tensors only).

    Raises SliderError when it cannot be read or holds anything but tensors, and as adapter_from_tensors.
    """
    return adapter_from_tensors(Path(path).name, read_tensors(path, "an adapter, a LoRA state dict"))


def adapter_from_tensors(name: str, file: TensorFile) -> Adapter:
    """Recognise an adapter. `name` is for messages.

    Raises SliderError when it has parts that a side path cannot compute (DoRA, LoHa, LoKr, biases), or keys that belong
    to no known family.
    """
    tensors, header = file
    halves: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, role = _split_key(key, name)
        halves[module][role] = tensor
    family, targets = _recognise(list(halves), name)
    declared_scale = _peft_alphas(header, name)
    factors: dict[str, list[Factor]] = defaultdict(list)
    for module, half in halves.items():
        target = targets[module]
        factors[target.module].append(_factor(name, module, half, target, declared_scale))
    text_only = all(map(family.acts_on_text_only, factors))
    return Adapter(name, "STLoRA" if text_only else "GSTLoRA", family, dict(factors))


def _split_key(key: str, file: str) -> tuple[str, str]:
    for role, endings in _ROLES.items():
        for ending in endings:
            if key.endswith(ending):
                return key.removesuffix(ending), role
    raise SliderError(
        f"{file} has a part that cannot run beside the model: {key!r}. Expected plain LoRA factors (up, down, alpha); "
        "DoRA, LoHa, LoKr, bias and full-weight parts would have to be merged. Use 'Load LoRA' for such a file."
    )


def _recognise(modules: list[str], file: str) -> tuple[Family, dict[str, Target]]:
    unknown: list[str] = []
    for family in FAMILIES:
        names = family.targets()
        flat = {name.replace(".", "_"): target for name, target in names.items()}
        found = {module: _lookup(module, names, flat) for module in modules}
        unknown = [module for module, target in found.items() if target is None]
        if not unknown:
            return family, {module: target for module, target in found.items() if target}
    known = ", ".join(family.name for family in FAMILIES)
    raise SliderError(
        f"{file} has {len(unknown)} of {len(modules)} layers that belong to no known model family ({known}), such as "
        f"{unknown[0]!r}. Choose a slider adapter made for one of these families."
    )


def _lookup(module: str, names: Mapping[str, Target], flat: Mapping[str, Target]) -> Target | None:
    for prefix in _PREFIXES:
        if module.startswith(prefix):
            bare = module.removeprefix(prefix)
            if bare in names or bare in flat:
                return names.get(bare) or flat[bare]
    return None


def _factor(
    file: str,
    module: str,
    half: Mapping[str, torch.Tensor],
    target: Target,
    declared_scale: Callable[[str, int], float],
) -> Factor:
    down, up = half.get("down"), half.get("up")
    if down is None or up is None:
        raise SliderError(f"{file} has only one of the two factors of {module!r}; the file is incomplete.")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or up.shape[0] % (target.size or 1):
        raise SliderError(
            f"{file}: the factors of {module!r} have shapes {tuple(down.shape)} and {tuple(up.shape)}; "
            "expected (rank, in) and (out, rank)."
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise SliderError(
            f"{file}: the factors of {module!r} are {down.dtype} and {up.dtype}; expected floating point."
        )
    rank = down.shape[0]
    scale = half["alpha"].flatten()[0].item() / rank if "alpha" in half else declared_scale(module, rank)
    return Factor(target.offset, target.size, down, up, scale)


def _peft_alphas(header: Mapping[str, str], file: str) -> Callable[[str, int], float]:
    """PEFT's scaling (module name, rank) -> lora_alpha / rank as a safetensors header declares it, else 1."""
    try:
        config = json.loads(header.get(_PEFT_HEADER, "{}"))
        declared = {key.rpartition("transformer.")[2]: value for key, value in config.items()}
        alpha = declared.get("lora_alpha")
        patterns = dict(declared.get("alpha_pattern") or {})
    except (ValueError, AttributeError) as error:
        raise SliderError(f"{file}: its header entry {_PEFT_HEADER!r} is not readable ({error}).") from error
    power = 0.5 if declared.get("use_rslora") else 1.0

    def scale(module: str, rank: int) -> float:
        own = next((v for k, v in patterns.items() if f".{module}".endswith(f".{k}")), alpha)
        return 1.0 if own is None else own / rank**power

    return scale


def _split_block(module: str, blocks: dict[str, set[int]]) -> tuple[str, str]:
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module)
    if match is None:
        return "", module
    blocks[match[1]].add(int(match[2]))
    return match[1], match[3]


def _layer_name(key: str, rows: set[int | None]) -> str:
    layer = key.partition(".")[2] if "." in key else key
    kept = [name for offset, name in enumerate(("q", "k", "v", "mlp")) if offset in rows]
    return f"{layer} ({', '.join(kept)})" if kept else layer


def _listed(values: list) -> str:
    return ", ".join(map(str, values))
