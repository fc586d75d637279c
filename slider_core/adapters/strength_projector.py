"""Strength projector: offsets of the text stream's modulation, computed from the strength and the pooled text.

    p(s) = [sin(pi s), cos(pi s)]
    (d_scale, d_shift) = MLP([E p(s), c])
    scale += d_scale,  shift += d_shift        in the text MLP's modulation of every double block

s: strength. E: linear extender. c: pooled text embedding. MLP: linears with ReLU between them. A LoRA that was trained
together with the projector runs on the model at full strength.

The offsets depend only on the strength and the pooled text, so they are computed once, when a strength is set on a
CONDITIONING, and are attached to it. Sampling only adds them.

Source: Kontinuous Kontext, arXiv 2510.08532, section 3 and appendix A.3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from comfy.conds import CONDRegular
from comfy.model_patcher import ModelPatcher
from comfy.utils import repeat_to_batch_size
from torch.nn.functional import linear, relu

from .. import keys
from .. import node_names as names
from ..conditioning.outside_strength import StrengthCarrier, current_outside_strength, require_before_mask_and_schedule
from ..conditioning.per_image_cond import PerImageCond
from ..errors import SliderError
from ..families import family_of
from ..families.network import diffusion_model_of
from ..patching.forward_patches import (
    Forward,
    ForwardContext,
    ForwardWrapper,
    ModelPatch,
    Phase,
    add_patch,
    patches_of,
)
from ..strength import Strengths, validate_strengths
from ..tensor_file import TensorFile, read_tensors
from ..types import Conditioning
from .adapter_file import Adapter, adapter_from_tensors

Linear = tuple[torch.Tensor, torch.Tensor]
"""Weight (out, in) and bias (out,) of a linear, both float32."""

_KEY = re.compile(r"(?:.*\.)?(pe_extender|projector\.\d{1,4})\.(weight|bias)")
_ENCODED_STRENGTH = 2  # length of p(s): sine and cosine


@dataclass(frozen=True, eq=False)
class StrengthProjector(StrengthCarrier):
    """The network of a projector file.

    name: file name, for messages. extender: maps p(s) to a vector, to which the pooled text embedding is appended.
    layers: the MLP, with ReLU between layers. Its output has 2 * hidden_size features: offsets of scale, then of shift.
    """

    name: str
    extender: Linear
    layers: tuple[Linear, ...]

    @property
    def hidden_size(self) -> int:
        """Hidden size of the model that it was trained for."""
        return self.layers[-1][0].shape[0] // 2

    @property
    def pooled_width(self) -> int:
        """Length of the pooled text embedding that it takes; 0 if the strength is its only input."""
        return self.layers[0][0].shape[1] - self.extender[0].shape[0]

    def offsets(self, strength: Strengths, pooled: torch.Tensor) -> torch.Tensor:
        """Offsets of scale and shift, float32 of shape (max(strengths, prompts), 2 * hidden_size).

        pooled: (prompts, pooled_width). Either number can be 1; otherwise both must be equal.
        """
        device = self.extender[0].device
        s = torch.tensor(strength, dtype=torch.float32, device=device)[:, None]
        x = linear(torch.cat([(math.pi * s).sin(), (math.pi * s).cos()], dim=1), *self.extender)
        count = max(len(x), len(pooled))
        x = torch.cat([x.expand(count, -1), pooled.float().to(device).expand(count, -1)], dim=1)
        *inner, last = self.layers
        for layer in inner:
            x = relu(linear(x, *layer))
        return linear(x, *last)

    def outside(self, options: Mapping[str, Any], strength: float) -> Mapping[str, CONDRegular]:
        return {keys.OUTSIDE_OFFSETS: CONDRegular(self.offsets((strength,), _pooled(self, options)))}


@dataclass(frozen=True, eq=False)
class ProjectorBundle:
    """A projector and the LoRA that was trained with it; None if only the projector was loaded."""

    projector: StrengthProjector
    lora: Adapter | None

    def describe(self) -> str:
        """Sizes of the projector and description of its LoRA as text for display."""
        p = self.projector
        inputs = f"strength and pooled text ({p.pooled_width})" if p.pooled_width else "strength only"
        warning = "WARNING: no LoRA. Edits will be wrong, since projector and LoRA were trained together."
        lora = self.lora.describe() if self.lora else warning
        return (
            f"{p.name}: strength projector for hidden size {p.hidden_size}\n"
            f"inputs: {inputs}, {len(p.layers)} layers\n{lora}"
        )


def read_projector(path: str | Path, lora_path: str | Path | None = None) -> ProjectorBundle:
    """Read a projector (.pth or .safetensors) and its LoRA: from `lora_path`, or else from the same file, or else none.

    Raises SliderError if a file cannot be read, contains anything other than tensors, or is not of the expected kind.
    """
    name = Path(path).name
    expected = "a strength projector (slider_projector.pth)"
    tensors, header = read_tensors(path, expected)
    matches = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    if not matches:
        raise SliderError(
            f"{name} does not contain a projector (first key: {next(iter(tensors))!r}); expected {expected} with the "
            "keys pe_extender.weight, projector.0.weight and so on. Choose the projector file as the projector, and "
            "its LoRA as the LoRA."
        )
    linears: dict[str, dict[str, torch.Tensor]] = {}
    for key, match in matches.items():
        if match[2] in linears.setdefault(match[1], {}):
            raise SliderError(
                f"{name} contains {match[1]}.{match[2]} twice, under different names; expected one projector. Choose "
                "another file."
            )
        linears[match[1]][match[2]] = tensors[key]
    projector = _projector(name, linears)
    lora_tensors = {key: tensor for key, tensor in tensors.items() if key not in matches}
    if lora_path is not None:
        lora_name = Path(lora_path).name
        tensors, header = read_tensors(lora_path, "the LoRA of a strength projector")
        lora_tensors = {key: tensor for key, tensor in tensors.items() if not _KEY.fullmatch(key)}
        if not lora_tensors:
            raise SliderError(
                f"{lora_name} is a projector; expected its LoRA, such as pytorch_lora_weights.safetensors. Choose that "
                "file as the LoRA."
            )
        return ProjectorBundle(projector, adapter_from_tensors(lora_name, TensorFile(lora_tensors, header)))
    lora = adapter_from_tensors(name, TensorFile(lora_tensors, header)) if lora_tensors else None
    return ProjectorBundle(projector, lora)


def _projector(name: str, linears: Mapping[str, Mapping[str, torch.Tensor]]) -> StrengthProjector:
    indices = sorted(int(key.rpartition(".")[2]) for key in linears if key != "pe_extender")
    keys = ["pe_extender", *(f"projector.{i}" for i in indices)]
    incomplete = [key for key in keys if set(linears.get(key, ())) != {"weight", "bias"}]
    if incomplete or not indices or indices != list(range(0, 2 * len(indices), 2)):
        missing = incomplete[0] if incomplete else f"projector.{2 * len(indices) - 2}"
        raise SliderError(
            f"{name} is incomplete: the weight or the bias of {missing} is missing. Expected pe_extender and "
            "projector.0, projector.2 and so on, without gaps. Download it again."
        )
    extender, *layers = (
        (_finite(name, f"{key}.weight", linears[key]["weight"]), _finite(name, f"{key}.bias", linears[key]["bias"]))
        for key in keys
    )
    sizes = [f"{tuple(weight.shape)} + {tuple(bias.shape)}" for weight, bias in (extender, *layers)]
    fits = (
        all(w.ndim == 2 and b.shape == w.shape[:1] and 0 not in w.shape for w, b in (extender, *layers))
        and extender[0].shape[1] == _ENCODED_STRENGTH
        and layers[0][0].shape[1] >= extender[0].shape[0]
        and all(b[0].shape[1] == a[0].shape[0] for a, b in pairwise(layers))
        and layers[-1][0].shape[0] % 2 == 0
    )
    if not fits:
        raise SliderError(
            f"{name} is not a strength projector of Kontinuous Kontext: its layers have the sizes {', '.join(sizes)}; "
            "expected (e, 2), then (n, e + pooled), (n, n) ... (2 * hidden, n). Choose another file."
        )
    return StrengthProjector(name, extender, tuple(layers))


def _finite(name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32. Raises SliderError unless its values are finite floating-point numbers."""
    values = tensor.float() if tensor.is_floating_point() else None
    if values is None or not values.isfinite().all():
        raise SliderError(
            f"{name}: {key} ({tensor.dtype}) contains values that are not finite floating-point numbers. Download it "
            "again."
        )
    return values


class ModulationOffset(ModelPatch):
    """Adds the offsets of a call's conds to the text MLP's modulation and runs the LoRA; no effect without offsets.

    paths: the modulation modules.
    """

    phase = Phase.OFFSET
    batch_independent = True

    def __init__(self, paths: list[str], hidden_size: int, lora: Adapter | None, load_device: torch.device):
        self.paths, self.hidden_size = paths, hidden_size
        self.branch_patcher = lora.lora_branches.patcher(load_device) if lora else None

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        offsets = context.conds.get(
            keys.PROJECTOR_OFFSETS if current_outside_strength(context) is None else keys.OUTSIDE_OFFSETS
        )
        if offsets is None:
            return {}
        if offsets.shape[1] != 2 * self.hidden_size:
            raise SliderError(
                f"The strength was set with a projector for hidden size {offsets.shape[1] // 2}, but the model has "
                f"{self.hidden_size}. Connect the same projector to '{names.PROJECTOR_STRENGTH}' and "
                f"'{names.APPLY_PROJECTOR}'."
            )
        wrappers = modulation_offsets(self.paths, offsets)
        if self.branch_patcher is not None:
            wrappers |= self.branch_patcher.model.forward_wrappers(torch.ones((), device=context.device))
        return wrappers


def modulation_offsets(paths: Sequence[str], offsets: torch.Tensor) -> dict[str, ForwardWrapper]:
    """Module path -> wrapper that adds offsets of shape (batch, 2 * hidden_size) to this text modulation."""
    return dict.fromkeys(paths, _add_offsets(*offsets[:, None].chunk(2, dim=-1)))


def _add_offsets(scale: torch.Tensor, shift: torch.Tensor) -> ForwardWrapper:
    """Wraps a modulation that returns (attention, mlp), each with shift, scale and gate of (batch, 1, hidden_size)."""

    def wrap(forward: Forward) -> Forward:
        def offset_forward(vec: torch.Tensor) -> Any:
            attention, mlp = forward(vec)
            new_shift, new_scale = mlp.shift + shift.to(mlp.shift.dtype), mlp.scale + scale.to(mlp.scale.dtype)
            return attention, type(mlp)(new_shift, new_scale, mlp.gate)

        return offset_forward

    return wrap


def apply_projector(model: ModelPatcher, bundle: ProjectorBundle) -> ModelPatcher:
    """A clone of `model` that applies the projector strengths of its conds; conds without one are not changed.

    Raises SliderError if the projector or the LoRA does not fit the model, or the model already has a projector.
    """
    family = family_of(model)
    diffusion_model = diffusion_model_of(model.model)
    hidden_size, projector = family.hidden_size(diffusion_model), bundle.projector
    if projector.hidden_size != hidden_size:
        raise SliderError(
            f"{projector.name} is for a model of hidden size {projector.hidden_size}, but this {family.name} model has "
            f"{hidden_size}. Choose the base model it was trained on."
        )
    if any(isinstance(patch, ModulationOffset) for patch in patches_of(model)):
        raise SliderError(
            f"The model already has a strength projector; only one is supported. Remove one '{names.APPLY_PROJECTOR}'."
        )
    if bundle.lora is not None:
        bundle.lora.check_fit(model, family)
    paths = family.text_modulations(diffusion_model)
    return add_patch(model, ModulationOffset(paths, hidden_size, bundle.lora, model.load_device))


def set_projector_strength(conditioning: Conditioning, bundle: ProjectorBundle, strength: object) -> Conditioning:
    """Set the projector's strength on a conditioning: a number, or one number per image of the batch.

    Each entry's own pooled text is used; several prompts in one entry are repeated over the batch, as ComfyUI does.
    Strength 0 is what the projector learned for 0, which differs from the model without projector.
    Raises SliderError for invalid strengths, pooled text that does not fit the projector, and a conditioning that has
    already been masked or scheduled.
    """
    values = validate_strengths(strength, "strength")
    out = []
    for cond, options in conditioning:
        pooled = _pooled(bundle.projector, options)
        if len(values) == 1:
            offsets: CONDRegular = CONDRegular(bundle.projector.offsets(values, pooled))
        else:
            offsets = PerImageCond(bundle.projector.offsets(values, repeat_to_batch_size(pooled, len(values))))
        out.append([cond, _with_offsets(options, bundle, offsets)])
    return out


def drop_projector_strength(conditioning: Conditioning, bundle: ProjectorBundle) -> Conditioning:
    """Set offsets of zero, so that the LoRA runs alone: the state when strength is dropped in training."""
    zeros = CONDRegular(torch.zeros(1, 2 * bundle.projector.hidden_size))
    return [[cond, _with_offsets(options, bundle, zeros)] for cond, options in conditioning]


def _with_offsets(options: Mapping[str, Any], bundle: ProjectorBundle, offsets: CONDRegular) -> dict[str, Any]:
    require_before_mask_and_schedule(options, names.PROJECTOR_STRENGTH)
    conds = {**options.get("model_conds", {}), keys.PROJECTOR_OFFSETS: offsets}
    return {**options, keys.PROJECTOR: bundle.projector, "model_conds": conds}


def _pooled(projector: StrengthProjector, options: Mapping[str, Any]) -> torch.Tensor:
    pooled = options.get("pooled_output")
    if projector.pooled_width == 0:
        return torch.zeros(1, 0)
    shape = "none" if pooled is None else f"one of shape {tuple(pooled.shape)}"
    if pooled is None or pooled.ndim != 2 or not len(pooled) or pooled.shape[1] != projector.pooled_width:
        raise SliderError(
            f"{projector.name} takes a pooled text embedding of {projector.pooled_width} values, but the conditioning "
            f"has {shape}; expected text encoded for FLUX.1 (clip_l and t5xxl). Use a CLIP for FLUX.1."
        )
    return pooled
