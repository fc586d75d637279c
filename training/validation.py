"""What an adapter does to pictures that it did not learn from: as the nodes would render them, at many strengths."""

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

from .config import Samples
from .examples import Example, as_picture
from .sample_cache import SampleCache, load_vae

GUIDANCE = 3.5

Slider = Adapter | ProjectorBundle


class Curve(NamedTuple):
    """How an edit comes with the strength.

    distances: root mean square of the pixels' difference from the source. first_order: share of the largest change
    between neighbours. delta_smooth: largest detour. rising: share of the steps that lead further from the source.
    """

    prompt: str
    strengths: list[float]
    distances: list[float]
    first_order: float | None
    delta_smooth: float | None
    rising: float


class HeldOut(NamedTuple):
    """pictures: the source and its edits, (n, height, width, 3). strengths: of each edit, one per slider."""

    prompt: str
    pictures: torch.Tensor
    strengths: list[tuple[float, ...]]


class Renderer:
    """Renders the examples of a cache with one model."""

    def __init__(self, model: ModelPatcher, cache: SampleCache, settings: Samples):
        self.model, self.cache, self.settings = model, cache, settings

    def write(self, slider: Slider, examples: Sequence[Example], folder: Path) -> list[Curve]:
        """Render into `folder`: a sheet per example, curves.json and curves.png. Returns the curves."""
        folder.mkdir(parents=True, exist_ok=True)
        curves = []
        for k, example in enumerate(examples):
            rendered = self.render(slider, example)
            sheet(rendered).save(folder / f"{k}.png")
            if found := curve(rendered):
                curves.append(found)
        content = json.dumps([found._asdict() for found in curves], indent=1)
        atomic_write(folder / "curves.json", content.encode())
        if curves:
            lines = {found.prompt: found.distances for found in curves}
            plot = curves_plot(curves[0].strengths, lines, "strength", "distance from the source")
            as_picture(plot[0]).save(folder / "curves.png")
        return curves

    def render(self, slider: Slider, example: Example) -> HeldOut:
        """The source and its edit at the strengths of the settings; two instructions of an STLoRA span a grid."""
        latent = self.cache.latent(example.source)
        selective = isinstance(slider, Adapter) and slider.adapter_type == "STLoRA"
        sliders = 2 if selective and len(example.instructions) == 2 else 1
        strengths = list(product(self.settings.strengths, repeat=sliders))
        noise = comfy.sample.prepare_noise(latent, self.settings.seed)
        with torch.no_grad():  # weights that are moved meanwhile must still have gradients run through them
            edits = [self._sampled(*self._at(slider, example, row, latent), noise) for row in strengths]
            vae = load_vae(self.cache.base.vae)
            pictures = torch.cat([vae.decode(one) for one in (latent, *edits)])
        return HeldOut(" and ".join(example.instructions), pictures, strengths)

    def _at(
        self, slider: Slider, example: Example, row: Sequence[float], latent: torch.Tensor
    ) -> tuple[ModelPatcher, Conditioning]:
        """Model and conditioning at these strengths."""
        found = self.cache.prompt(example.instructions)
        options = {
            "pooled_output": found.text.pooled.float(),
            "guidance": GUIDANCE,
            "reference_latents": [latent],
            "reference_latents_method": "offset",
        }
        conditioning: Conditioning = [[found.text.states.float(), options]]
        if isinstance(slider, ProjectorBundle):
            return apply_projector(self.model, slider), set_projector_strength(conditioning, slider, row[0])
        if slider.adapter_type == "GSTLoRA":
            return apply_gstlora(self.model, slider, row[0]), conditioning
        spans = [Span(text, rows) for text, rows in zip(example.instructions, found.rows)]
        conditioning = attach_spans(conditioning, found.text.states.shape[1], spans)
        each = row if len(row) > 1 else [row[0]] * len(spans)
        strengths = {f"strength_{k}": value for k, value in enumerate(each, 1)}
        return apply_stlora(self.model, slider), set_strengths(conditioning, strengths)

    def _sampled(self, model: ModelPatcher, conditioning: Conditioning, noise: torch.Tensor) -> torch.Tensor:
        how = (self.settings.steps, 1.0, "euler", "simple")
        empty = torch.zeros_like(noise)
        return comfy.sample.sample(model, noise, *how, conditioning, conditioning, empty, disable_pbar=True)


def curve(held_out: HeldOut) -> Curve | None:
    """How evenly the edit comes; None for grids."""
    if len(held_out.strengths[0]) > 1:
        return None
    source, *edits = held_out.pictures
    adjacent = [_distance(a, b) for a, b in pairwise(edits)]
    skipping = [_distance(a, b) for a, b in zip(edits, edits[2:])]
    distances = [_distance(source, edit) for edit in edits]
    largest = detour = None
    with contextlib.suppress(SliderError):  # nothing changes: there is no shape to speak of
        largest, detour = first_order(adjacent), delta_smooth(adjacent, skipping) if skipping else None
    rising = sum(b > a for a, b in pairwise(distances)) / len(adjacent)
    return Curve(held_out.prompt, [row[0] for row in held_out.strengths], distances, largest, detour, rising)


def sheet(held_out: HeldOut) -> Image.Image:
    """Source and edits with their strengths, as one picture; above a grid the source has a row of its own."""
    source, *edits = map(as_picture, held_out.pictures)
    captions = [" / ".join(f"{value:g}" for value in row) for row in held_out.strengths]
    if len(held_out.strengths[0]) > 1:
        side = round(len(edits) ** 0.5)
        blank = [Image.new("RGB", source.size, "white")] * (side - 1)
        return contact_sheet([source, *blank, *edits], ["source", *[""] * len(blank), *captions], side, held_out.prompt)
    return contact_sheet([source, *edits], ["source", *captions], len(edits) + 1, held_out.prompt)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).pow(2).mean().sqrt().item()
