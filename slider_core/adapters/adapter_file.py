"""Slider adapter files: the authors' files, and any LoRA with PEFT, diffusers, ComfyUI or kohya key names.

The adapter's type, rank, family and target linears are recognized from the keys alone; whether it fits a model is
checked when it is applied.
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

from .. import node_names as names
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
    """A slider adapter.

    name: file name, for messages.
    adapter_type: 'STLoRA' if all target linears run on text tokens only, so that it can act on some of them; else
    'GSTLoRA'.
    lora_weights: module path in ComfyUI's model -> low-rank updates of slices of that linear.
    """

    name: str
    adapter_type: str
    family: Family
    lora_weights: Mapping[str, list[LoraWeights]]

    @cached_property
    def lora_branches(self) -> LoraBranches:
        """The LoRA weights as a module, created once and shared by all models that the adapter is applied to."""
        return LoraBranches(self.lora_weights)

    @property
    def ranks(self) -> list[int]:
        """All ranks that occur, ascending."""
        return sorted({w.down.shape[0] for weights in self.lora_weights.values() for w in weights})

    def require_type(self, adapter_type: str) -> None:
        """Raise SliderError, naming the node for the adapter, unless it is of this type ('STLoRA' or 'GSTLoRA')."""
        if self.adapter_type == adapter_type:
            return
        if adapter_type == "STLoRA":
            raise SliderError(
                f"{self.name} is a GSTLoRA: it also changes linears outside the text stream, so it cannot act on "
                "single instructions. Expected an STLoRA file such as selective_lora.pt. Use "
                f"'{names.APPLY_GSTLORA}' for this file."
            )
        raise SliderError(
            f"{self.name} is an STLoRA: it changes the text stream only and is trained to act on single instructions. "
            f"Expected a GSTLoRA file such as pytorch_lora_weights.safetensors. Use '{names.APPLY_STLORA}' for this "
            "file."
        )

    def check_fit(self, model: ModelPatcher, family: Family) -> None:
        """Raise SliderError unless `model`, which is of this family, has every target linear, of the right size."""
        if family is not self.family:
            raise SliderError(
                f"{self.name} is for {self.family.name}, but the model is {family.name}. Choose an adapter and a model "
                "of the same family."
            )
        diffusion_model = diffusion_model_of(model.model)
        modules = dict(diffusion_model.named_modules())
        missing = [name for name in self.lora_weights if not hasattr(modules.get(name), "in_features")]
        if missing:
            raise SliderError(
                f"{self.name} changes {len(missing)} linears that this {family.name} model does not have, such as "
                f"{missing[0]}; expected an adapter trained for this model. Choose the base model it was trained on."
            )
        hidden_size = family.hidden_size(diffusion_model)
        for name, weights in self.lora_weights.items():
            linear = modules[name]
            for w in weights:
                features = linear.out_features if w.size is None else w.size * hidden_size
                if w.down.shape[1] != linear.in_features or w.up.shape[0] != features:
                    raise SliderError(
                        f"{self.name} does not fit the model: its weights for {name} map {w.down.shape[1]} to "
                        f"{w.up.shape[0]} features, but that linear maps {linear.in_features} to {linear.out_features} "
                        f"(hidden size {hidden_size}). Choose the base model it was trained on."
                    )

    def describe(self) -> str:
        """Type, family, rank, scale and target linears as text for display."""
        block_indices: dict[str, set[int]] = defaultdict(set)
        offsets: dict[str, set[int | None]] = defaultdict(set)
        for module, weights in self.lora_weights.items():
            block_list, linear = _split_block(module, block_indices)
            offsets[f"{block_list}.{linear}" if block_list else linear].update(
                None if w.size is None else w.offset for w in weights
            )
        acts = "on the instructions you choose" if self.adapter_type == "STLoRA" else "on the whole prompt"
        scales = sorted({round(w.scale, 6) for weights in self.lora_weights.values() for w in weights})
        lines = [
            f"{self.name}: {self.adapter_type}, acts {acts}",
            f"base: {self.family.name}, {len(self.lora_weights)} linears",
            f"rank: {_listed(self.ranks)}; alpha / rank: {_listed(scales)}",
        ]
        for block_list, indices in block_indices.items():
            linears = [_linear_name(key, own) for key, own in offsets.items() if key.startswith(f"{block_list}.")]
            lines.append(f"{block_list} {min(indices)}-{max(indices)}: {', '.join(linears)}")
        lines += [_linear_name(key, own) for key, own in offsets.items() if key.partition(".")[0] not in block_indices]
        return "\n".join(lines)


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter file (.safetensors, or a torch file that contains only tensors).

    Raises SliderError as read_tensors and adapter_from_tensors do.
    """
    return adapter_from_tensors(Path(path).name, read_tensors(path, "an adapter (a LoRA state dict)"))


def adapter_from_tensors(name: str, file: TensorFile) -> Adapter:
    """Build the Adapter from the tensors of a file. name: file name, for messages.

    Raises SliderError for anything that cannot run as an unmerged LoRA branch (DoRA, LoHa, LoKr, biases), for keys of
    unsupported model families, and for incomplete or malformed weights.
    """
    tensors, header = file
    roles: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, role = _split_key(key, name)
        if role in roles[module]:
            raise SliderError(
                f"{name} contains the {role} weight of {module!r} twice, under different names; expected one per "
                "linear. Choose another file."
            )
        roles[module][role] = tensor
    family, targets = _recognize(list(roles), name)
    peft_scale = _peft_scaling(header, name)
    lora_weights: dict[str, list[LoraWeights]] = defaultdict(list)
    for module, tensors_by_role in roles.items():
        target = targets[module]
        lora_weights[target.module].append(_lora_weights(name, module, tensors_by_role, target, peft_scale))
    text_only = all(map(family.acts_on_text_only, lora_weights))
    return Adapter(name, "STLoRA" if text_only else "GSTLoRA", family, dict(lora_weights))


def _split_key(key: str, file: str) -> tuple[str, str]:
    for role, pattern in _ROLES.items():
        if match := pattern.fullmatch(key):
            return match[1], role
    raise SliderError(
        f"{file} contains {key!r}, which cannot run as an unmerged LoRA branch. Expected plain LoRA weights (up, down, "
        "alpha); DoRA, LoHa, LoKr, biases and full weights would have to be merged. Use 'Load LoRA' for such a file."
    )


def _recognize(modules: list[str], file: str) -> tuple[Family, dict[str, LinearSlice]]:
    unknown: list[str] = []
    for family in FAMILIES:
        lora_targets = family.lora_targets()
        flat = {name.replace(".", "_"): target for name, target in lora_targets.items()}
        targets = {module: _lookup(module, lora_targets, flat) for module in modules}
        unknown = [module for module, target in targets.items() if target is None]
        if not unknown:
            return family, {module: target for module, target in targets.items() if target}
    supported = ", ".join(family.name for family in FAMILIES)
    raise SliderError(
        f"{file}: {len(unknown)} of {len(modules)} linears, such as {unknown[0]!r}, are not linears of a supported "
        f"model ({supported}). Choose a slider adapter trained for such a model."
    )


def _lookup(module: str, targets: Mapping[str, LinearSlice], flat: Mapping[str, LinearSlice]) -> LinearSlice | None:
    for prefix in _PREFIXES:
        if module.startswith(prefix):
            bare = module.removeprefix(prefix)
            if bare in targets or bare in flat:
                return targets.get(bare) or flat[bare]
    return None


def _lora_weights(
    file: str,
    module: str,
    tensors: Mapping[str, torch.Tensor],
    target: LinearSlice,
    peft_scale: Callable[[str, int], float],
) -> LoraWeights:
    down, up = tensors.get("down"), tensors.get("up")
    if down is None or up is None:
        raise SliderError(
            f"{file} is incomplete: it contains only one of the two LoRA weights (down, up) of {module!r}. Download it "
            "again."
        )
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] > 0 or up.shape[0] % (target.size or 1):
        raise SliderError(
            f"{file}: the LoRA weights of {module!r} have the shapes {tuple(down.shape)} and {tuple(up.shape)}; "
            "expected (rank, in) and (out, rank). Choose another file."
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise SliderError(
            f"{file}: the LoRA weights of {module!r} are {down.dtype} and {up.dtype}; expected floating point. Choose "
            "another file."
        )
    down, up = _computable(down), _computable(up)
    if not (down.isfinite().all() and up.isfinite().all()):
        raise SliderError(
            f"{file} is damaged: the LoRA weights of {module!r} contain values that are not finite. Download it again."
        )
    rank = down.shape[0]
    scale = _alpha(tensors["alpha"], module, file) / rank if "alpha" in tensors else peft_scale(module, rank)
    return LoraWeights(target.offset, target.size, down, up, scale)


def _computable(weight: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bfloat16, since they can be neither multiplied nor concatenated with other types."""
    return weight.to(torch.bfloat16) if weight.element_size() == 1 else weight


def _alpha(value: object, module: str, file: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SliderError(f"{file}: the LoRA alpha of {module!r} is {value!r}; expected one finite number.")
    return float(value)


def _peft_scaling(header: Mapping[str, str], file: str) -> Callable[[str, int], float]:
    """PEFT's scaling: (module name, rank) -> lora_alpha / rank as declared in a safetensors header, or else 1.

    To PEFT, keys of alpha_pattern are regular expressions. Here, only module names with escaped dots are accepted, as
    PEFT writes them, because expressions from files should not be executed.
    """
    try:
        config = json.loads(header.get(_PEFT_HEADER, "{}"))
        declared = {key.rpartition("transformer.")[2]: value for key, value in config.items()}
        patterns = {key.replace("\\.", "."): value for key, value in (declared.get("alpha_pattern") or {}).items()}
    except (ValueError, AttributeError) as error:
        raise SliderError(
            f"{file}: the header entry {_PEFT_HEADER!r} cannot be read ({error}); expected PEFT's configuration as "
            "JSON. Download the file again."
        ) from error
    expressions = [key for key in patterns if not re.fullmatch(r"[\w.]+", key)]
    if expressions:
        raise SliderError(
            f"{file}: alpha_pattern contains the regular expression {expressions[0]!r}; expected names of linears. "
            "Save the adapter with plain names."
        )
    alpha = declared.get("lora_alpha")
    power = 0.5 if declared.get("use_rslora") else 1.0

    def scale(module: str, rank: int) -> float:
        own = next((v for k, v in patterns.items() if f".{module}".endswith(f".{k}")), alpha)
        return 1.0 if own is None else _alpha(own, module, file) / rank**power

    return scale


def _split_block(module: str, block_indices: dict[str, set[int]]) -> tuple[str, str]:
    """(name of the block list, path in the block) of a module; notes its block index. ('', module) outside blocks."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module)
    if match is None:
        return "", module
    block_indices[match[1]].add(int(match[2]))
    return match[1], match[3]


def _linear_name(key: str, offsets: set[int | None]) -> str:
    linear = key.partition(".")[2] if "." in key else key
    slices = [name for offset, name in enumerate(("q", "k", "v", "mlp")) if offset in offsets]
    return f"{linear} ({', '.join(slices)})" if slices else linear


def _listed(values: list) -> str:
    return ", ".join(map(str, values))
