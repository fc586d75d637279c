"""Graphs in ComfyUI's API format that render an edit and its strengths, with placeholders for what changes.

Placeholders are texts: {image} (the source, as LoadImage takes it), {instruction}, {seed}, and for the strengths
{strength} (0 to 1) and {edit} (the full edit, as LoadImage takes it).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import TrainingError
from .config import Graphs, Latents, Sliders

Graph = dict[str, Any]

_PLACEHOLDER = re.compile(r"\{(image|edit|instruction|strength|seed)\}")
_INSTRUCTION_SLOT = {"text": "{instruction}"}


class StackGraphs(NamedTuple):
    """edit: makes the full edit. strengths: makes the edit at a strength."""

    edit: Graph
    strengths: Graph


def graphs_for(render: Latents | Sliders | Graphs) -> StackGraphs:
    """The graphs that a config asks for. Raises TrainingError when a file of the user's is not such a graph."""
    if isinstance(render, Graphs):
        return StackGraphs(_read(render.edit, ("image", "instruction")), _read(render.strengths, ("image", "strength")))
    strengths = _interpolated(render) if isinstance(render, Latents) else _slid(render)
    return StackGraphs(_edit(render), strengths)


def filled(graph: Graph, values: Mapping[str, str | float]) -> Graph:
    """The graph with values for its placeholders; a text that is nothing but a placeholder becomes the value itself."""

    def fill(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: fill(value) for key, value in part.items()}
        if isinstance(part, list):
            return [fill(value) for value in part]
        if not isinstance(part, str):
            return part
        whole = _PLACEHOLDER.fullmatch(part)
        if whole and whole[1] in values:
            return values[whole[1]]
        return _PLACEHOLDER.sub(lambda found: str(values.get(found[1], found[0])), part)

    return fill(graph)


def _edit(render: Latents | Sliders) -> Graph:
    """Plain Kontext."""
    text = _node("CLIPTextEncode", clip=["clip", 0], **_INSTRUCTION_SLOT)
    return {**_loaders(render), "text": text, **_sampling(render, ["model", 0], ["text", 0])}


def _interpolated(render: Latents) -> Graph:
    """Latents between source and edit, put back among the model's own pictures by noise and denoising."""
    return {
        **_loaders(render),
        "edit": _node("LoadImage", image="{edit}"),
        "edit_latent": _node("VAEEncode", pixels=["edit", 0], vae=["vae", 0]),
        "between": _node("LatentInterpolate", samples1=["edit_latent", 0], samples2=["latent", 0], ratio="{strength}"),
        "full": _node("CLIPTextEncode", clip=["clip", 0], **_INSTRUCTION_SLOT),
        "neutral": _node("CLIPTextEncode", clip=["clip", 0], text=render.neutral),
        "text": _node(
            "ConditioningAverage",
            conditioning_to=["full", 0],
            conditioning_from=["neutral", 0],
            conditioning_to_strength="{strength}",
        ),
        **_sampling(render, ["model", 0], ["text", 0], ["between", 0], render.renoise),
    }


def _slid(render: Sliders) -> Graph:
    """The instruction at a strength of an adapter."""
    adapter = _node("EditSlidersLoadAdapter", adapter_name=render.adapter)
    text = _node(
        "EditSlidersEncodeSubInstructions", clip=["clip", 0], mode="one per line", pad_to_512=True, **_INSTRUCTION_SLOT
    )
    shared = {**_loaders(render), "adapter": adapter, "text": text}
    if render.adapter_kind == "gstlora":
        model = _node("EditSlidersApplyGSTLoRA", model=["model", 0], adapter=["adapter", 0], strength="{strength}")
        return {**shared, "slider_model": model, **_sampling(render, ["slider_model", 0], ["text", 0])}
    model = _node("EditSlidersApplySTLoRA", model=["model", 0], adapter=["adapter", 0])
    at = _node("EditSlidersSubInstructionStrengths", conditioning=["text", 0], strength_1="{strength}")
    return {**shared, "slider_model": model, "at": at, **_sampling(render, ["slider_model", 0], ["at", 0])}


def _loaders(render: Latents | Sliders) -> Graph:
    first, second = render.text_encoders
    return {
        "model": _node("UNETLoader", unet_name=render.model, weight_dtype=render.weight_dtype),
        "clip": _node("DualCLIPLoader", clip_name1=first, clip_name2=second, type="flux"),
        "vae": _node("VAELoader", vae_name=render.vae),
        "image": _node("LoadImage", image="{image}"),
        "latent": _node("VAEEncode", pixels=["image", 0], vae=["vae", 0]),
    }


def _sampling(
    render: Latents | Sliders,
    model: Sequence[Any],
    text: Sequence[Any],
    start: Sequence[Any] = ("latent", 0),
    part: float = 1.0,
) -> Graph:
    """The last `part` of the schedule, from `start` with noise, beside the source."""
    return {
        "reference": _node("ReferenceLatent", conditioning=list(text), latent=["latent", 0]),
        "guided": _node("FluxGuidance", conditioning=["reference", 0], guidance=render.guidance),
        "sampled": _node(
            "KSampler",
            model=list(model),
            positive=["guided", 0],
            negative=["guided", 0],
            latent_image=list(start),
            seed="{seed}",
            steps=math.ceil(render.steps * part),
            cfg=1.0,
            sampler_name=render.sampler,
            scheduler=render.scheduler,
            denoise=part,
        ),
        "decoded": _node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        "picture": _node("PreviewImage", images=["decoded", 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _read(file: Path, needed: Sequence[str]) -> Graph:
    try:
        graph = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"The graph {file} cannot be read: {error}.") from error
    nodes = graph.values() if isinstance(graph, dict) and graph else [None]
    if not all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict) for node in nodes
    ):
        raise TrainingError(
            f"{file.name} is no graph in ComfyUI's API format; expected node ids with class_type and inputs. Export it "
            "by Workflow > Export (API)."
        )
    there = set(_PLACEHOLDER.findall(json.dumps(graph)))
    if missing := [f'"{{{name}}}"' for name in needed if name not in there]:
        raise TrainingError(
            f"{file.name} has no {', '.join(missing)}; put it, as text, where that value belongs in the graph."
        )
    return graph
