"""Workflows that users saved with version 0.1: its 14 templates and their API exports still load and run.

tests/data/workflows_0.1 holds each template as it was, and as the page of that version exported it ("Export (API)").
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import REPO
from support.browser import ComfyPage

OLD = REPO / "tests" / "data" / "workflows_0.1"
NUM_IMAGES = {  # that each workflow saves
    "calibrated_slider": 1,
    "consistent_style": 4,
    "incremental_editing": 4,
    "layer_analysis": 1,
    "parallel_edit": 3,
    "photograph_edit": 3,
    "remembered_source": 1,
    "single_slider": 1,
    "slider_prompt": 1,
    "strength_projector": 1,
    "strength_sweep": 4,
    "text_editing": 4,
    "two_sub_prompt_sliders": 1,
    "without_adapter": 1,
}
TINY_LAYERS = {"layers": "listed below", "list": "0-3"}
TINY_INPUTS: dict[str, dict[str, Any]] = {  # for the tiny models, and fewer steps; every other input is the user's
    "UNETLoader": {"unet_name": "tiny-kontext.safetensors"},
    "VAELoader": {"vae_name": "taef1"},
    "LoadImage": {"image": "photo.png"},
    "KSampler": {"steps": 1},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
    "BasicScheduler": {"steps": 2},
    "EditSlidersLoadProjector": {"lora_name": "projector_lora.safetensors"},
    "EditSlidersInjectVitalLayers": TINY_LAYERS,
    "EditSlidersRememberSource": {**TINY_LAYERS, "steps": 1},
    "EditSlidersFindVitalLayers": {"steps": 1, "count": 2},
    "EditSlidersViewAttention": {"steps": 1},
}
LOADERS = {
    "UNETLoader",
    "VAELoader",
    "DualCLIPLoader",
    "LoadImage",
    "EditSlidersLoadAdapter",
    "EditSlidersLoadProjector",
}
TINY_TEXT_ENCODERS = {"clip_l": "tiny-clip-l.safetensors", "t5xxl": "tiny-t5xxl.safetensors"}


def old_workflow(name: str) -> dict[str, Any]:
    return json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))


def old_export(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((OLD / f"{name}.api.json").read_text(encoding="utf-8"))


def for_tiny_models(graph: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The export with tiny files, few steps and the 64x64 photo as it is."""
    for node in graph.values():
        inputs = node["inputs"]
        match node["class_type"]:
            case "DualCLIPLoader":
                node |= {"class_type": "TinyTestTextEncoders", "inputs": TINY_TEXT_ENCODERS}
            case "FluxKontextImageScale":
                node |= {"class_type": "RepeatImageBatch", "inputs": {**inputs, "amount": 1}}
            case "EditSlidersLoadAdapter" if inputs["adapter_name"] == "slideredit_gstlora.safetensors":
                inputs["adapter_name"] = "gst_peft.safetensors"
            case class_type:
                changes = TINY_INPUTS.get(class_type, {})
                node["inputs"] = inputs | {key: value for key, value in changes.items() if not is_link(inputs[key])}
    return graph


def is_link(value: Any) -> bool:
    return isinstance(value, list)


def inputs_of(graph: dict[str, dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Node id -> its class and inputs, without what the page adds for people."""
    return {key: (node["class_type"], node["inputs"]) for key, node in graph.items()}


def node_types(view: ComfyPage, condition: str) -> list[str]:
    """Of the nodes in the page that meet a condition in JavaScript."""
    return view.page.evaluate(f"app.graph.nodes.filter(node => {condition}).map(node => node.type)")


@pytest.mark.parametrize("name", NUM_IMAGES)
def test_an_old_api_export_runs(server, name):
    graph = for_tiny_models(old_export(name))
    result = server.run(graph)  # raises PromptRejected if the server would skip an output
    assert result.ok, result.error
    [saved] = [key for key, node in graph.items() if node["class_type"] == "SaveImage"]
    assert len(result.images(saved)) == NUM_IMAGES[name]


@pytest.mark.parametrize("name", NUM_IMAGES)
def test_an_old_workflow_loads_in_the_page_as_it_was_saved(view, name):
    view.open(old_workflow(name))
    assert set(node_types(view, "node.has_errors")) <= LOADERS  # whose files are missing
    assert node_types(view, "!LiteGraph.registered_node_types[node.type]") == []
    assert inputs_of(view.prompt()) == inputs_of(old_export(name))
    assert view.errors == []
