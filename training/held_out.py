"""What the adapter does to pictures that it does not learn from: as the nodes would render them, at many strengths."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import comfy.sample
import torch
from PIL import Image

from slider_core.contact_sheet import contact_sheet
from slider_core.errors import SliderError
from slider_core.global_lora import apply_gstlora
from slider_core.selective_lora import apply_stlora
from slider_core.smoothness import delta_smooth, first_order
from slider_core.span_strengths import Conditioning, Span, attach_spans, set_strengths
from slider_core.strength_projector import StrengthProjector, apply_projector, set_projector_strength

from .examples import Example, as_picture
from .sample_cache import load_vae

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .run import Run

_GUIDANCE_IN_USE = 3.5


class Curve(NamedTuple):
    """distances: of each picture from the source. Of neighbours: the largest share, and the largest detour."""

    prompt: str
    strengths: list[float]
    distances: list[float]
    first_order: float | None
    delta_smooth: float | None
    rising: float


class HeldOut(NamedTuple):
    """pictures: the source and its edits, (n, height, width, 3). rows: strengths of each edit."""

    example: Example
    pictures: torch.Tensor
    strengths: list[tuple[float, ...]]


def render(run: Run, example: Example) -> HeldOut:
    """The example's source and its edit at the config's strengths; two instructions of an STLoRA span a grid."""
    settings = run.config.samples
    latent = run.cache.latent(example.source)
    two = run.config.method == "stlora" and len(example.instructions) == 2
    strengths: list[tuple[float, ...]] = list(product(settings.strengths, repeat=2 if two else 1))
    noise = comfy.sample.prepare_noise(latent, settings.seed)
    edits = []
    with torch.inference_mode():
        for row in strengths:
            model, conditioning = _at(run, example, row, latent)
            edits.append(_sampled(model, conditioning, latent, noise, settings.steps))
        vae = load_vae(run.config.base.vae)
        pictures = torch.cat([vae.decode(one) for one in (latent, *edits)])
    return HeldOut(example, pictures, strengths)


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
    rising = sum(b > a for a, b in pairwise(distances)) / (len(distances) - 1)
    prompt = " and ".join(held_out.example.instructions)
    return Curve(prompt, [row[0] for row in held_out.strengths], distances, largest, detour, rising)


def sheet(held_out: HeldOut) -> Image.Image:
    """Source and edits with their strengths, as one picture."""
    source, *edits = map(as_picture, held_out.pictures)
    captions = [" / ".join(f"{value:g}" for value in row) for row in held_out.strengths]
    columns = round(len(edits) ** 0.5) if len(held_out.strengths[0]) > 1 else len(edits) + 1
    if columns > len(edits):
        edits, captions = [source, *edits], ["source", *captions]
    return contact_sheet(edits, captions, columns, " and ".join(held_out.example.instructions))


def write(run: Run, folder: Path) -> list[Curve]:
    """Render all held-out examples into `folder`: a sheet each, and curves.json. Returns the curves."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = []
    for k, example in enumerate(run.examples.held_out):
        rendered = render(run, example)
        sheet(rendered).save(folder / f"{k}.png")
        if found := curve(rendered):
            curves.append(found)
    (folder / "curves.json").write_text(json.dumps([found._asdict() for found in curves], indent=1), encoding="utf-8")
    return curves


def _at(run: Run, example: Example, row: Sequence[float], latent: torch.Tensor) -> tuple[ModelPatcher, Conditioning]:
    """Model and conditioning with the adapter as it is now, at these strengths."""
    found = run.cache.prompt(example.instructions)
    options = {
        "pooled_output": found.text.pooled.float(),
        "guidance": _GUIDANCE_IN_USE,
        "reference_latents": [latent],
        "reference_latents_method": "offset",
    }
    conditioning: Conditioning = [[found.text.states.float(), options]]
    adapter = run.result.lora.adapter(run.config.name)
    if run.config.method == "gstlora":
        return apply_gstlora(run.base.patcher, adapter, row[0]), conditioning
    if run.config.method == "stlora":
        spans = [Span(text, rows) for text, rows in zip(example.instructions, found.rows)]
        conditioning = attach_spans(conditioning, found.text.states.shape[1], spans)
        each = row if len(row) > 1 else [row[0]] * len(spans)
        strengths = {f"strength_{k}": value for k, value in enumerate(each, 1)}
        return apply_stlora(run.base.patcher, adapter), set_strengths(conditioning, strengths)
    assert run.result.projector is not None
    bundle = StrengthProjector(run.result.projector.projector, adapter)
    return apply_projector(run.base.patcher, bundle), set_projector_strength(conditioning, bundle, row[0])


def _sampled(
    model: ModelPatcher, conditioning: Conditioning, latent: torch.Tensor, noise: torch.Tensor, steps: int
) -> torch.Tensor:
    empty = torch.zeros_like(latent)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", conditioning, conditioning, empty, disable_pbar=True
    )


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).pow(2).mean().sqrt().item()
