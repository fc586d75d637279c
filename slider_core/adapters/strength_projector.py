"""Strength projector: one strength to offsets of the text's modulation (Kontinuous Kontext, section 3 and A.3).

The offsets depend on nothing but the strength and the prompt's pooled vector, so they are computed once, when a
strength is set on a CONDITIONING, and travel with it. Sampling only adds them.
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

Layer = tuple[torch.Tensor, torch.Tensor]
"""Weight (out, in) and bias (out,) of a linear, float32."""

_KEY = re.compile(r"(?:.*\.)?(pe_extender|projector\.\d{1,4})\.(weight|bias)")
_CIRCLE = 2  # sine and cosine of the strength


@dataclass(frozen=True, eq=False)
class StrengthProjector(StrengthCarrier):
    """The network of a projector file.

    extender: lifts sine and cosine of the strength to a vector, which the pooled vector of the prompt is appended to.
    layers: applied in turn, ReLU between. The last gives 2 * width values: offsets of the scale, then of the shift.
    """

    name: str
    extender: Layer
    layers: tuple[Layer, ...]

    @property
    def width(self) -> int:
        """Hidden size of the model it was trained for."""
        return self.layers[-1][0].shape[0] // 2

    @property
    def pooled_width(self) -> int:
        """Length of the pooled vector it reads; 0 if it looks at the strength alone."""
        return self.layers[0][0].shape[1] - self.extender[0].shape[0]

    def offsets(self, strength: Strengths, pooled: torch.Tensor) -> torch.Tensor:
        """Offsets of scale and shift, float32 of shape (max(strengths, prompts), 2 * width).

        pooled: (prompts, pooled_width). One strength, one prompt, or as many of both.
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
    """A projector and the LoRA that was trained with it, if it is at hand."""

    projector: StrengthProjector
    lora: Adapter | None

    def describe(self) -> str:
        """Sizes of the projector, and what its LoRA is, for people."""
        p = self.projector
        reads = f"strength and pooled text ({p.pooled_width})" if p.pooled_width else "strength alone"
        lora = "WARNING: no LoRA. Edits will be off, since both were trained together."
        lora = self.lora.describe() if self.lora else lora
        return f"{p.name}: strength projector for hidden size {p.width}\nreads: {reads}, {len(p.layers)} layers\n{lora}"


def read_projector(path: str | Path, lora_path: str | Path | None = None) -> ProjectorBundle:
    """Read a projector (.pth or .safetensors) and its LoRA: from `lora_path`, else from the same file, else none.

    Raises SliderError when a file cannot be read, holds anything but tensors, or is no projector.
    """
    name = Path(path).name
    wanted = "a strength projector (slider_projector.pth)"
    tensors, header = read_tensors(path, wanted)
    named = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
    if not named:
        raise SliderError(
            f"{name} has no projector in it (first key: {next(iter(tensors))!r}); expected {wanted} with the keys "
            "pe_extender.weight, projector.0.weight and so on. Choose the projector here and its LoRA as the LoRA."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, match in named.items():
        if match[2] in parts.setdefault(match[1], {}):
            raise SliderError(f"{name} has {match[1]}.{match[2]} twice under different names; expected one projector.")
        parts[match[1]][match[2]] = tensors[key]
    projector = _projector(name, parts)
    rest = {key: tensor for key, tensor in tensors.items() if key not in named}
    if lora_path is not None:
        lora_name = Path(lora_path).name
        tensors, header = read_tensors(lora_path, "the LoRA of a strength projector")
        rest = {key: tensor for key, tensor in tensors.items() if not _KEY.fullmatch(key)}
        if not rest:
            raise SliderError(f"{lora_name} is a projector; expected its LoRA, pytorch_lora_weights.safetensors.")
        return ProjectorBundle(projector, adapter_from_tensors(lora_name, TensorFile(rest, header)))
    lora = adapter_from_tensors(name, TensorFile(rest, header)) if rest else None
    return ProjectorBundle(projector, lora)


def _projector(name: str, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> StrengthProjector:
    numbers = sorted(int(part.rpartition(".")[2]) for part in parts if part != "pe_extender")
    order = ["pe_extender", *(f"projector.{n}" for n in numbers)]
    incomplete = [part for part in order if set(parts.get(part, ())) != {"weight", "bias"}]
    if incomplete or not numbers or numbers != list(range(0, 2 * len(numbers), 2)):
        missing = incomplete[0] if incomplete else f"projector.{2 * len(numbers) - 2}"
        raise SliderError(
            f"{name} is incomplete: {missing} has not both weight and bias. Expected pe_extender and projector.0, "
            "projector.2 and so on, without gaps. Download it again."
        )
    extender, *layers = (
        (_finite(name, f"{part}.weight", parts[part]["weight"]), _finite(name, f"{part}.bias", parts[part]["bias"]))
        for part in order
    )
    sizes = [f"{tuple(weight.shape)} + {tuple(bias.shape)}" for weight, bias in (extender, *layers)]
    fits = (
        all(w.ndim == 2 and b.shape == w.shape[:1] and 0 not in w.shape for w, b in (extender, *layers))
        and extender[0].shape[1] == _CIRCLE
        and layers[0][0].shape[1] >= extender[0].shape[0]
        and all(b[0].shape[1] == a[0].shape[0] for a, b in pairwise(layers))
        and layers[-1][0].shape[0] % 2 == 0
    )
    if not fits:
        raise SliderError(
            f"{name}: its layers have the sizes {', '.join(sizes)}; expected (e, 2), then (n, e + pooled), "
            "(n, n) ... (2 * hidden, n). It is no strength projector of Kontinuous Kontext."
        )
    return StrengthProjector(name, extender, tuple(layers))


def _finite(name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32."""
    values = tensor.float() if tensor.is_floating_point() else None
    if values is None or not values.isfinite().all():
        raise SliderError(f"{name}: {key} ({tensor.dtype}) holds other than finite floating-point values.")
    return values


class ModulationOffset(ModelPatch):
    """Operation: adds the offsets of a call's conds to scale and shift of the text's MLP, and runs the LoRA there."""

    phase = Phase.OFFSET
    batch_independent = True

    def __init__(self, paths: list[str], width: int, lora: Adapter | None, load_device: torch.device):
        self.paths, self.width = paths, width
        self.lora_branches = lora.lora_branches.patcher(load_device) if lora else None

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        offsets = context.conds.get(
            keys.PROJECTOR_OFFSETS if current_outside_strength(context) is None else keys.OUTSIDE_OFFSETS
        )
        if offsets is None:
            return {}
        if offsets.shape[1] != 2 * self.width:
            raise SliderError(
                f"The strength on the conditioning comes from a projector for hidden size {offsets.shape[1] // 2}, the "
                f"model has {self.width}. Give 'Projector Strength' the projector that is applied to the model."
            )
        changes = modulation_offsets(self.paths, offsets)
        if self.lora_branches is not None:
            changes |= self.lora_branches.model.forward_wrappers(torch.ones((), device=context.device))
        return changes


def modulation_offsets(paths: Sequence[str], offsets: torch.Tensor) -> dict[str, ForwardWrapper]:
    """Overrides that add offsets of shape (batch, 2 * width), as Projector.offsets gives them, to text modulations."""
    return dict.fromkeys(paths, _offset(*offsets[:, None].chunk(2, dim=-1)))


def _offset(scale: torch.Tensor, shift: torch.Tensor) -> ForwardWrapper:
    """Around a modulation that gives (attention, mlp), each with shift, scale and gate of shape (batch, 1, width)."""

    def wrap(forward: Forward) -> Forward:
        def with_offset(vec: torch.Tensor) -> Any:
            attention, mlp = forward(vec)
            moved_shift, moved_scale = mlp.shift + shift.to(mlp.shift.dtype), mlp.scale + scale.to(mlp.scale.dtype)
            return attention, type(mlp)(moved_shift, moved_scale, mlp.gate)

        return with_offset

    return wrap


def apply_projector(model: ModelPatcher, bundle: ProjectorBundle) -> ModelPatcher:
    """A clone of `model` that obeys the projector strengths of its conds; conds without one are left alone.

    Raises SliderError when projector or LoRA do not fit the model, or it already has a projector.
    """
    family = family_of(model)
    diffusion_model = diffusion_model_of(model.model)
    width, projector = family.hidden_size(diffusion_model), bundle.projector
    if projector.width != width:
        raise SliderError(
            f"{projector.name} is for a model of hidden size {projector.width}, this {family.name} has {width}. "
            "Choose the base model it was trained on."
        )
    if any(isinstance(patch, ModulationOffset) for patch in patches_of(model)):
        raise SliderError("The model already has a strength projector; expected one. Remove an Apply node.")
    if bundle.lora is not None:
        bundle.lora.check_fit(model, family)
    paths = family.text_modulations(diffusion_model)
    return add_patch(model, ModulationOffset(paths, width, bundle.lora, model.load_device))


def set_projector_strength(conditioning: Conditioning, bundle: ProjectorBundle, strength: object) -> Conditioning:
    """The conditioning at a strength of the projector: a number, or one per image of the batch.

    The pooled vector is each cond's own; several prompts in one cond are spread over the batch, as ComfyUI does with
    them. Strength 0 is the projector's own zero, which is not the bare model.
    Raises SliderError for a bad strength or a pooled vector that the projector cannot read.
    """
    values = validate_strengths(strength, "strength")
    out = []
    for cond, options in conditioning:
        pooled = _pooled(bundle.projector, options)
        if len(values) == 1:
            moved: CONDRegular = CONDRegular(bundle.projector.offsets(values, pooled))
        else:
            moved = PerImageCond(bundle.projector.offsets(values, repeat_to_batch_size(pooled, len(values))))
        out.append([cond, _with_offsets(options, bundle, moved)])
    return out


def drop_projector_strength(conditioning: Conditioning, bundle: ProjectorBundle) -> Conditioning:
    """The conditioning with the LoRA but without any offset: what training showed when it dropped the strength."""
    nothing = CONDRegular(torch.zeros(1, 2 * bundle.projector.width))
    return [[cond, _with_offsets(options, bundle, nothing)] for cond, options in conditioning]


def _with_offsets(options: Mapping[str, Any], bundle: ProjectorBundle, offsets: CONDRegular) -> dict[str, Any]:
    require_before_mask_and_schedule(options, names.PROJECTOR_STRENGTH)
    conds = {**options.get("model_conds", {}), keys.PROJECTOR_OFFSETS: offsets}
    return {**options, keys.PROJECTOR: bundle.projector, "model_conds": conds}


def _pooled(projector: StrengthProjector, options: Mapping[str, Any]) -> torch.Tensor:
    pooled = options.get("pooled_output")
    if projector.pooled_width == 0:
        return torch.zeros(1, 0)
    found = "no pooled vector" if pooled is None else f"one of shape {tuple(pooled.shape)}"
    if pooled is None or pooled.ndim != 2 or not len(pooled) or pooled.shape[1] != projector.pooled_width:
        raise SliderError(
            f"{projector.name} reads a pooled text vector of {projector.pooled_width} values, but the conditioning has "
            f"{found}; expected text encoded for FLUX.1 (clip_l and t5xxl)."
        )
    return pooled
