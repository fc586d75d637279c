"""Renders validation examples at several strengths, exactly as the nodes do, and measures the sliders' smoothness."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from slider_core.adapters.adapter_file import Adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.adapters.strength_projector import ProjectorBundle, apply_projector, set_projector_strength
from slider_core.atomic_write import atomic_write
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.errors import SliderError
from slider_core.figures.contact_sheet import contact_sheet
from slider_core.figures.plots import curves_plot
from slider_core.metrics.smoothness import delta_smooth, first_order
from slider_core.types import Conditioning

from .config import ValidationConfig
from .examples import Example, tensor_to_pil
from .sample_cache import SampleCache, load_vae

GUIDANCE = 3.5
"""FLUX's guidance embedding: ComfyUI's default. Validation samples as users do, so the value does not follow
objective.guidance, which is 1 for a projector."""

Slider = Adapter | ProjectorBundle


class StrengthCurve(NamedTuple):
    """How an edit changes with the strength.

    distances: RMS pixel difference from the source, one per strength. first_order: largest change between adjacent
    strengths, divided by the total change. delta_smooth: largest detour. rising: fraction of the intervals between
    adjacent strengths that move away from the source. None where nothing changes.
    """

    prompt: str
    strengths: list[float]
    distances: list[float]
    first_order: float | None
    delta_smooth: float | None
    rising: float


class ValidationRender(NamedTuple):
    """images: the source and its edits, (n + 1, height, width, 3). strengths: n tuples, one strength per slider."""

    prompt: str
    images: torch.Tensor
    strengths: list[tuple[float, ...]]


class ValidationRenderer:
    """Renders cached examples with a model."""

    def __init__(self, model: ModelPatcher, cache: SampleCache, config: ValidationConfig):
        self.model, self.cache, self.config = model, cache, config

    def write(self, slider: Slider, examples: Sequence[Example], folder: Path) -> list[StrengthCurve]:
        """Write a contact sheet per example, curves.json and curves.png. Returns the curves; grids have none."""
        folder.mkdir(parents=True, exist_ok=True)
        curves = []
        for k, example in enumerate(examples):
            rendered = self.render(slider, example)
            validation_sheet(rendered).save(folder / f"{k}.png")
            if curve := strength_curve(rendered):
                curves.append(curve)
        content = json.dumps([curve._asdict() for curve in curves], indent=1)
        atomic_write(folder / "curves.json", content.encode())
        if curves:
            lines = {curve.prompt: curve.distances for curve in curves}
            plot = curves_plot(curves[0].strengths, lines, "strength", "distance from the source")
            tensor_to_pil(plot[0]).save(folder / "curves.png")
        return curves

    def render(self, slider: Slider, example: Example) -> ValidationRender:
        """The source and its edit at all strengths of the config.

        Two instructions with an STLoRA give a grid of all pairs of strengths; otherwise one strength is for all.
        """
        latent = self.cache.latent(example.source)
        is_stlora = isinstance(slider, Adapter) and slider.adapter_type == "STLoRA"
        num_sliders = 2 if is_stlora and len(example.instructions) == 2 else 1
        strengths = list(product(self.config.strengths, repeat=num_sliders))
        noise = comfy.sample.prepare_noise(latent, self.config.seed)
        with torch.no_grad():  # not inference_mode: weights that are moved here must still work with autograd
            edits = [self._sample(*self._apply(slider, example, values, latent), noise) for values in strengths]
            vae = load_vae(self.cache.config.vae)
            images = torch.cat([vae.decode(one) for one in (latent, *edits)])
        return ValidationRender(" and ".join(example.instructions), images, strengths)

    def _apply(
        self, slider: Slider, example: Example, strengths: Sequence[float], latent: torch.Tensor
    ) -> tuple[ModelPatcher, Conditioning]:
        """Model and conditioning with the slider at these strengths."""
        prompt = self.cache.prompt(example.instructions)
        options = {
            "pooled_output": prompt.text.pooled.float(),
            "guidance": GUIDANCE,
            "reference_latents": [latent],
            "reference_latents_method": "offset",
        }
        conditioning: Conditioning = [[prompt.text.states.float(), options]]
        if isinstance(slider, ProjectorBundle):
            return apply_projector(self.model, slider), set_projector_strength(conditioning, slider, strengths[0])
        if slider.adapter_type == "GSTLoRA":
            return apply_gstlora(self.model, slider, strengths[0]), conditioning
        spans = [Span(text, tokens) for text, tokens in zip(example.instructions, prompt.tokens)]
        conditioning = attach_spans(conditioning, prompt.text.states.shape[1], spans)
        per_span = strengths if len(strengths) > 1 else [strengths[0]] * len(spans)
        inputs = {f"strength_{k}": value for k, value in enumerate(per_span, 1)}
        return apply_stlora(self.model, slider), set_strengths(conditioning, inputs)

    def _sample(self, model: ModelPatcher, conditioning: Conditioning, noise: torch.Tensor) -> torch.Tensor:
        settings = (self.config.steps, 1.0, "euler", "simple")
        empty = torch.zeros_like(noise)
        return comfy.sample.sample(model, noise, *settings, conditioning, conditioning, empty, disable_pbar=True)


def strength_curve(rendered: ValidationRender) -> StrengthCurve | None:
    """The curve of a single slider; None for grids."""
    if len(rendered.strengths[0]) > 1:
        return None
    source, *edits = rendered.images
    adjacent = [_rms_difference(a, b) for a, b in pairwise(edits)]
    skipping = [_rms_difference(a, b) for a, b in zip(edits, edits[2:])]
    distances = [_rms_difference(source, edit) for edit in edits]
    largest = detour = None
    with contextlib.suppress(SliderError):  # nothing changes
        largest, detour = first_order(adjacent), delta_smooth(adjacent, skipping) if skipping else None
    rising = sum(b > a for a, b in pairwise(distances)) / len(adjacent)
    strengths = [values[0] for values in rendered.strengths]
    return StrengthCurve(rendered.prompt, strengths, distances, largest, detour, rising)


def validation_sheet(rendered: ValidationRender) -> Image.Image:
    """Contact sheet of the source and its edits, captioned with the strengths: one row, or the source above a grid."""
    source, *edits = map(tensor_to_pil, rendered.images)
    captions = [" / ".join(f"{value:g}" for value in values) for values in rendered.strengths]
    if len(rendered.strengths[0]) > 1:
        side = round(len(edits) ** 0.5)
        blank = [Image.new("RGB", source.size, "white")] * (side - 1)
        return contact_sheet([source, *blank, *edits], ["source", *[""] * len(blank), *captions], side, rendered.prompt)
    return contact_sheet([source, *edits], ["source", *captions], len(edits) + 1, rendered.prompt)


def _rms_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).pow(2).mean().sqrt().item()
