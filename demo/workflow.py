"""The demo's graph as a workflow for the browser: the template *slider_prompt* with the demo's models and image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graph import MINIATURE_STEPS
from models import Models

NAME = "edit_sliders_demo"
_TEMPLATE = Path(__file__).resolve().parents[1] / "workflows" / "slider_prompt.json"


def workflow(models: Models, photo: str, instructions: Sequence[str]) -> dict[str, Any]:
    """The workflow for the image `photo` of the input folder; no instructions: those of the template."""
    graph = json.loads(_TEMPLATE.read_text(encoding="utf-8"))
    nodes = {node["type"]: node for node in graph["nodes"]}
    nodes["UNETLoader"]["widgets_values"][0] = models.model
    nodes["VAELoader"]["widgets_values"][0] = models.vae
    nodes["EditSlidersLoadAdapter"]["widgets_values"][0] = models.adapter
    nodes["LoadImage"]["widgets_values"][0] = photo
    nodes["DualCLIPLoader"]["widgets_values"][:2] = models.clip_l, models.t5xxl
    prompt = nodes["EditSlidersSliderPrompt"]["widgets_values"]
    if instructions:
        prompt[0] = "\n".join(instructions)
    if models.miniature:
        prompt[2] = False
        nodes["KSampler"]["widgets_values"][2] = MINIATURE_STEPS
        _use_small_text_encoder_loader(nodes["DualCLIPLoader"], models)
        _remove_scaling(graph, nodes)
    return graph


def _use_small_text_encoder_loader(loader: dict[str, Any], models: Models) -> None:
    loader["type"] = "SmallTextEncoders"
    loader["properties"] = {"Node name for S&R": "SmallTextEncoders"}
    loader["inputs"] = []
    loader["widgets_values"] = [models.clip_l, models.t5xxl, 32]


def _remove_scaling(graph: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    """Use the image at its own size: FluxKontextImageScale would scale it to about a million pixels."""
    scale, image = nodes["FluxKontextImageScale"], nodes["LoadImage"]
    input_link, output_links = scale["inputs"][0]["link"], scale["outputs"][0]["links"]
    graph["nodes"].remove(scale)
    graph["links"] = [link for link in graph["links"] if link[0] != input_link]
    for link in graph["links"]:
        if link[0] in output_links:
            link[1:3] = image["id"], 0
    image["outputs"][0]["links"] = list(output_links)
