"""The demo's graph as a workflow for the browser: the template *slider_prompt* with the demo's models and picture."""

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
    """For `photo` of the input folder; without instructions those of the template."""
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
        _use_small_text_encoders(nodes["DualCLIPLoader"], models)
        _keep_size(graph, nodes)
    return graph


def _use_small_text_encoders(loader: dict[str, Any], models: Models) -> None:
    loader["type"] = "SmallTextEncoders"
    loader["properties"] = {"Node name for S&R": "SmallTextEncoders"}
    loader["inputs"] = []
    loader["widgets_values"] = [models.clip_l, models.t5xxl, 32]


def _keep_size(graph: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    """Take the picture as it is: FluxKontextImageScale would make a million pixels of it."""
    scale, picture = nodes["FluxKontextImageScale"], nodes["LoadImage"]
    into, out_of = scale["inputs"][0]["link"], scale["outputs"][0]["links"]
    graph["nodes"].remove(scale)
    graph["links"] = [link for link in graph["links"] if link[0] != into]
    for link in graph["links"]:
        if link[0] in out_of:
            link[1:3] = picture["id"], 0
    picture["outputs"][0]["links"] = list(out_of)
