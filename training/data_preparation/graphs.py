"""ComfyUI graphs, in API format, that render an edit and its intermediate strengths.

They contain placeholders: {image} (the source, as a Load Image value), {instruction} and {seed}; graphs of intermediate
strengths also {strength} (0 to 1) and {edit} (the full edit, as a Load Image value).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import TrainingError
from .config import GraphConfig, LatentInterpolationConfig, SliderConfig

Graph = dict[str, Any]

_PLACEHOLDER = re.compile(r"\{(image|edit|instruction|strength|seed)\}")
_INSTRUCTION_INPUT = {"text": "{instruction}"}

# The node ids below are part of the hash by which finished strips are recognized: do not change them.


class StripGraphs(NamedTuple):
    """edit: renders the full edit. strengths: renders the edit at a strength."""

    edit: Graph
    strengths: Graph


def build_graphs(render: LatentInterpolationConfig | SliderConfig | GraphConfig) -> StripGraphs:
    """The graphs for a config. Raises TrainingError when a graph file of the user is invalid."""
    if isinstance(render, GraphConfig):
        return StripGraphs(_read(render.edit, ("image", "instruction")), _read(render.strengths, ("image", "strength")))
    strengths = _latent_graph(render) if isinstance(render, LatentInterpolationConfig) else _slider_graph(render)
    return StripGraphs(_edit_graph(render), strengths)


def fill_placeholders(graph: Graph, values: Mapping[str, str | float]) -> Graph:
    """The graph with placeholders replaced. A text that consists of a placeholder only becomes the value itself."""

    def fill(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: fill(value) for key, value in node.items()}
        if isinstance(node, list):
            return [fill(value) for value in node]
        if not isinstance(node, str):
            return node
        match = _PLACEHOLDER.fullmatch(node)
        if match and match[1] in values:
            return values[match[1]]
        return _PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), node)

    return fill(graph)


def _edit_graph(render: LatentInterpolationConfig | SliderConfig) -> Graph:
    """Plain FLUX.1 Kontext."""
    text = _node("CLIPTextEncode", clip=["clip", 0], **_INSTRUCTION_INPUT)
    return {**_loaders(render), "text": text, **_sampling(render, ["model", 0], ["text", 0])}


def _latent_graph(render: LatentInterpolationConfig) -> Graph:
    """Interpolate latents and conditionings of source and edit, then add noise and denoise."""
    return {
        **_loaders(render),
        "edit": _node("LoadImage", image="{edit}"),
        "edit_latent": _node("VAEEncode", pixels=["edit", 0], vae=["vae", 0]),
        "between": _node("LatentInterpolate", samples1=["edit_latent", 0], samples2=["latent", 0], ratio="{strength}"),
        "full": _node("CLIPTextEncode", clip=["clip", 0], **_INSTRUCTION_INPUT),
        "neutral": _node("CLIPTextEncode", clip=["clip", 0], text=render.neutral_prompt),
        "text": _node(
            "ConditioningAverage",
            conditioning_to=["full", 0],
            conditioning_from=["neutral", 0],
            conditioning_to_strength="{strength}",
        ),
        **_sampling(render, ["model", 0], ["text", 0], ["between", 0], render.denoise),
    }


def _slider_graph(render: SliderConfig) -> Graph:
    """The instruction at a strength, by an adapter."""
    adapter = _node("EditSlidersLoadAdapter", adapter_name=render.adapter)
    text = _node(
        "EditSlidersEncodeSubInstructions",
        clip=["clip", 0],
        mode="one per line",
        pad_to_512=True,
        **_INSTRUCTION_INPUT,
    )
    shared = {**_loaders(render), "adapter": adapter, "text": text}
    if render.adapter_type == "gstlora":
        model = _node("EditSlidersApplyGSTLoRA", model=["model", 0], adapter=["adapter", 0], strength="{strength}")
        return {**shared, "slider_model": model, **_sampling(render, ["slider_model", 0], ["text", 0])}
    model = _node("EditSlidersApplySTLoRA", model=["model", 0], adapter=["adapter", 0])
    strengths = _node("EditSlidersSubInstructionStrengths", conditioning=["text", 0], strength_1="{strength}")
    return {**shared, "slider_model": model, "at": strengths, **_sampling(render, ["slider_model", 0], ["at", 0])}


def _loaders(render: LatentInterpolationConfig | SliderConfig) -> Graph:
    first, second = render.text_encoders
    return {
        "model": _node("UNETLoader", unet_name=render.model, weight_dtype=render.weight_dtype),
        "clip": _node("DualCLIPLoader", clip_name1=first, clip_name2=second, type="flux"),
        "vae": _node("VAELoader", vae_name=render.vae),
        "image": _node("LoadImage", image="{image}"),
        "latent": _node("VAEEncode", pixels=["image", 0], vae=["vae", 0]),
    }


def _sampling(
    render: LatentInterpolationConfig | SliderConfig,
    model: Sequence[Any],
    conditioning: Sequence[Any],
    latent: Sequence[Any] = ("latent", 0),
    denoise: float = 1.0,
) -> Graph:
    """Sample from `latent` with the source as reference latent. denoise: KSampler's; steps are reduced accordingly."""
    return {
        "reference": _node("ReferenceLatent", conditioning=list(conditioning), latent=["latent", 0]),
        "guided": _node("FluxGuidance", conditioning=["reference", 0], guidance=render.guidance),
        "sampled": _node(
            "KSampler",
            model=list(model),
            positive=["guided", 0],
            negative=["guided", 0],
            latent_image=list(latent),
            seed="{seed}",
            steps=math.ceil(render.steps * denoise),
            cfg=1.0,
            sampler_name=render.sampler,
            scheduler=render.scheduler,
            denoise=denoise,
        ),
        "decoded": _node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        "picture": _node("PreviewImage", images=["decoded", 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _read(file: Path, required: Sequence[str]) -> Graph:
    try:
        graph = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"The graph {file} cannot be read: {error}.") from error
    nodes = graph.values() if isinstance(graph, dict) and graph else [None]
    if not all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict) for node in nodes
    ):
        raise TrainingError(
            f"{file.name} is not a graph in ComfyUI's API format; expected node ids with class_type and inputs. Export "
            "the workflow with Workflow > Export (API)."
        )
    placeholders = set(_PLACEHOLDER.findall(json.dumps(graph)))
    if missing := [f'"{{{name}}}"' for name in required if name not in placeholders]:
        raise TrainingError(
            f"{file.name} does not contain {', '.join(missing)}; set the inputs that need these values to these texts."
        )
    return graph
