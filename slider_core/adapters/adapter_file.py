"""Slider adapters from disk: the authors' files, PEFT/diffusers, ComfyUI and kohya names.

Kind, rank, family and targets are recognised from the keys alone; whether a model fits is checked when it is applied.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher

from ..errors import SliderError
from ..families import FAMILIES, Family, LinearSlice
from ..families.network import diffusion_model_of
from ..patching.lora_branch import LoraBranches, LoraWeights
from ..tensor_file import TensorFile, read_tensors

_ROLES = {
    "down": re.compile(r"(.+)(?:\.lora_A(?:\.\w+)?|[._]lora[._]down)\.weight"),
    "up": re.compile(r"(.+)(?:\.lora_B(?:\.\w+)?|[._]lora[._]up)\.weight"),
    "alpha": re.compile(r"(.+)\.alpha"),
}
_PREFIXES = (
    "transformer.",
    "unet.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "base_model.model.transformer.",
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
    adapter_type: str
    family: Family
    lora_weights: Mapping[str, list[LoraWeights]]

    @cached_property
    def lora_branches(self) -> LoraBranches:
        """The factors as a module, made once and shared by all models they are applied to."""
        return LoraBranches(self.lora_weights)

    @property
    def ranks(self) -> list[int]:
        return sorted({f.down.shape[0] for parts in self.lora_weights.values() for f in parts})

    def check_fit(self, model: ModelPatcher, family: Family) -> None:
        """Raise SliderError unless every factor has its linear in `model`, of the right size."""
        if family is not self.family:
            raise SliderError(f"{self.name} is for {self.family.name}, but the model is {family.name}.")
        diffusion_model = diffusion_model_of(model.model)
        modules = dict(diffusion_model.named_modules())
        missing = [name for name in self.lora_weights if not hasattr(modules.get(name), "in_features")]
        if missing:
            raise SliderError(
                f"{self.name} changes {len(missing)} layers that this {family.name} model does not have, such as "
                f"{missing[0]}; expected an adapter trained for this model. Choose the base model it was trained on."
            )
        width = family.hidden_size(diffusion_model)
        for name, parts in self.lora_weights.items():
            linear = modules[name]
            for f in parts:
                rows = linear.out_features if f.size is None else f.size * width
                if f.down.shape[1] != linear.in_features or f.up.shape[0] != rows:
                    raise SliderError(
                        f"{self.name} does not fit the model: at {name} it maps {f.down.shape[1]} to {f.up.shape[0]} "
                        f"values, the model's layer maps {linear.in_features} to {linear.out_features} (hidden size "
                        f"{width}). Choose the base model it was trained on."
                    )

    def describe(self) -> str:
        """Kind, family, rank, scale and target layers, for people."""
        blocks: dict[str, set[int]] = defaultdict(set)
        parts: dict[str, set[int | None]] = defaultdict(set)
        for module, lora_weights in self.lora_weights.items():
            stack, layer = _split_block(module, blocks)
            parts[f"{stack}.{layer}" if stack else layer].update(
                None if f.size is None else f.offset for f in lora_weights
            )
        acts = "on the words you choose" if self.adapter_type == "STLoRA" else "on the whole instruction"
        scales = sorted({round(f.scale, 6) for fs in self.lora_weights.values() for f in fs})
        lines = [
            f"{self.name}: {self.adapter_type}, acts {acts}",
            f"base: {self.family.name}, {len(self.lora_weights)} layers",
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
        if role in halves[module]:
            raise SliderError(f"{name} has {module!r} twice under different names; expected one {role} for each layer.")
        halves[module][role] = tensor
    family, targets = _recognise(list(halves), name)
    declared_scale = _peft_alphas(header, name)
    lora_weights: dict[str, list[LoraWeights]] = defaultdict(list)
    for module, half in halves.items():
        target = targets[module]
        lora_weights[target.module].append(_factor(name, module, half, target, declared_scale))
    text_only = all(map(family.acts_on_text_only, lora_weights))
    return Adapter(name, "STLoRA" if text_only else "GSTLoRA", family, dict(lora_weights))


def _split_key(key: str, file: str) -> tuple[str, str]:
    for role, pattern in _ROLES.items():
        if match := pattern.fullmatch(key):
            return match[1], role
    raise SliderError(
        f"{file} has a part that cannot run beside the model: {key!r}. Expected plain LoRA factors (up, down, alpha); "
        "DoRA, LoHa, LoKr, bias and full-weight parts would have to be merged. Use 'Load LoRA' for such a file."
    )


def _recognise(modules: list[str], file: str) -> tuple[Family, dict[str, LinearSlice]]:
    unknown: list[str] = []
    for family in FAMILIES:
        names = family.lora_targets()
        flat = {name.replace(".", "_"): target for name, target in names.items()}
        found = {module: _lookup(module, names, flat) for module in modules}
        unknown = [module for module, target in found.items() if target is None]
        if not unknown:
            return family, {module: target for module, target in found.items() if target}
    known = ", ".join(family.name for family in FAMILIES)
    raise SliderError(
        f"{file} has {len(unknown)} of {len(modules)} layers that are not known here as parts of a model ({known}), "
        f"such as {unknown[0]!r}. Choose a slider adapter made for one of these families."
    )


def _lookup(module: str, names: Mapping[str, LinearSlice], flat: Mapping[str, LinearSlice]) -> LinearSlice | None:
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
    target: LinearSlice,
    declared_scale: Callable[[str, int], float],
) -> LoraWeights:
    down, up = half.get("down"), half.get("up")
    if down is None or up is None:
        raise SliderError(f"{file} has only one of the two factors of {module!r}; the file is incomplete.")
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] > 0 or up.shape[0] % (target.size or 1):
        raise SliderError(
            f"{file}: the factors of {module!r} have shapes {tuple(down.shape)} and {tuple(up.shape)}; "
            "expected (rank, in) and (out, rank)."
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise SliderError(
            f"{file}: the factors of {module!r} are {down.dtype} and {up.dtype}; expected floating point."
        )
    down, up = _computable(down), _computable(up)
    if not (down.isfinite().all() and up.isfinite().all()):
        raise SliderError(f"{file}: the factors of {module!r} hold values that are not finite; the file is damaged.")
    rank = down.shape[0]
    scale = _number(half["alpha"], module, file) / rank if "alpha" in half else declared_scale(module, rank)
    return LoraWeights(target.offset, target.size, down, up, scale)


def _computable(factor: torch.Tensor) -> torch.Tensor:
    """8-bit floats only store; they cannot be multiplied or joined with others."""
    return factor.to(torch.bfloat16) if factor.element_size() == 1 else factor


def _number(value: object, module: str, file: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SliderError(f"{file}: the alpha of {module!r} is {value!r}; expected one finite number.")
    return float(value)


def _peft_alphas(header: Mapping[str, str], file: str) -> Callable[[str, int], float]:
    """PEFT's scaling (module name, rank) -> lora_alpha / rank as a safetensors header declares it, else 1.

    Keys of alpha_pattern are regular expressions to PEFT. Plain names with escaped dots, which is what gets written,
    are understood; others are refused, since a file should not make us run its expressions.
    """
    try:
        config = json.loads(header.get(_PEFT_HEADER, "{}"))
        declared = {key.rpartition("transformer.")[2]: value for key, value in config.items()}
        patterns = {key.replace("\\.", "."): value for key, value in (declared.get("alpha_pattern") or {}).items()}
    except (ValueError, AttributeError) as error:
        raise SliderError(f"{file}: its header entry {_PEFT_HEADER!r} is not readable ({error}).") from error
    odd = [key for key in patterns if not re.fullmatch(r"[\w.]+", key)]
    if odd:
        raise SliderError(f"{file}: its alpha_pattern has the expression {odd[0]!r}; expected names of layers.")
    alpha = declared.get("lora_alpha")
    power = 0.5 if declared.get("use_rslora") else 1.0

    def scale(module: str, rank: int) -> float:
        own = next((v for k, v in patterns.items() if f".{module}".endswith(f".{k}")), alpha)
        return 1.0 if own is None else _number(own, module, file) / rank**power

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
