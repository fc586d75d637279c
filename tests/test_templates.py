"""Templates, help pages, README and the texts on nodes, in the real frontend in a real browser."""

from __future__ import annotations

import io
import json
import re
import urllib.parse
from typing import Any

import pytest
from conftest import REPO
from PIL import Image
from support.comfy_server import ComfyServer

WORKFLOWS = REPO / "workflows"
NUM_IMAGES = {  # that each template saves
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
NAMES = tuple(NUM_IMAGES)
NUM_MODEL_FILES = {  # in a template's graph; 4 in all others
    "calibrated_slider": 5,
    "single_slider": 5,
    "slider_prompt": 5,
    "strength_projector": 6,
    "strength_sweep": 5,
    "two_sub_prompt_sliders": 5,
}
PACK = "ComfyUI-EditSliders"
OURS = "EditSliders"


def template(server: ComfyServer, name: str) -> dict[str, Any]:
    """A template as the server sends it to the frontend."""
    return json.loads(server.get(f"/api/workflow_templates/{PACK}/{name}.json"))


def with_tiny_files(workflow: dict[str, Any]) -> dict[str, Any]:
    """The template with the tiny models, small latents and few steps."""
    for node in workflow["nodes"]:
        values = node.get("widgets_values")
        match node["type"]:
            case "UNETLoader":
                values[0] = "tiny-kontext.safetensors"
            case "VAELoader":
                values[0] = "taef1"
            case "LoadImage":
                values[0] = "photo.png"
            case "KSampler":
                values[2] = 1
            case "EditSlidersLoadAdapter" if values[0] == "slideredit_gstlora.safetensors":
                values[0] = "gst_peft.safetensors"
            case "EmptySD3LatentImage":
                values[:2] = 64, 64
            case "EditSlidersInjectVitalLayers" | "EditSlidersRememberSource":
                values[:2] = "listed below", "0-3"
                values[4:5] = [1] if node["type"] == "EditSlidersRememberSource" else values[4:5]
            case "BasicScheduler":
                values[1] = 2
            case "EditSlidersFindVitalLayers":
                values[4] = 1
                values[7] = 2
            case "EditSlidersViewAttention":
                values[2] = 1
            case "EditSlidersLoadProjector":
                values[1] = "projector_lora.safetensors"
            case "DualCLIPLoader":
                node |= {"type": "TinyTestTextEncoders", "inputs": [], "properties": {}}
                node["widgets_values"] = ["tiny-clip-l.safetensors", "tiny-t5xxl.safetensors"]
    return workflow


def without_upscaling(graph: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The graph without FluxKontextImageScale, which would enlarge the small input image to a megapixel."""
    for key in [key for key, node in graph.items() if node["class_type"] == "FluxKontextImageScale"]:
        graph[only(graph, "VAEEncode")]["inputs"]["pixels"] = graph.pop(key)["inputs"]["image"]
    return graph


def only(graph: dict[str, dict[str, Any]], class_type: str) -> str:
    """Id of the graph's only node of a type."""
    (node_id,) = (key for key, node in graph.items() if node["class_type"] == class_type)
    return node_id


def test_the_frontend_lists_the_templates(server):
    listed = json.loads(server.get("/api/workflow_templates"))
    assert sorted(listed[PACK]) == sorted(NAMES)
    for name in NAMES:
        thumbnail = Image.open(io.BytesIO(server.get(f"/api/workflow_templates/{PACK}/{name}.jpg")))
        assert thumbnail.width == thumbnail.height


@pytest.mark.parametrize("name", NAMES)
def test_templates_use_only_nodes_of_comfyui_and_the_pack(server, name):
    info = server.object_info()
    for node in template(server, name)["nodes"]:
        if node["type"] != "MarkdownNote":
            module = info[node["type"]]["python_module"]
            assert module in ("nodes", f"custom_nodes.{PACK}") or module.startswith("comfy_extras."), node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_templates_run_and_save_their_images(server, view, name):
    view.open(with_tiny_files(template(server, name)))
    graph = without_upscaling(view.prompt())
    result = server.run(graph)
    assert result.ok, result.error
    assert len(result.images(only(graph, "SaveImage"))) == NUM_IMAGES[name]
    assert view.errors == []


@pytest.mark.parametrize("name", NAMES)
def test_the_note_of_a_template_lists_its_model_files(server, view, name):
    workflow = template(server, name)
    view.open(workflow)
    graph = view.prompt()
    files = {
        value
        for node in graph.values()
        for value in node["inputs"].values()
        if isinstance(value, str) and value.endswith((".safetensors", ".pt", ".pth"))
    }
    (note,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert len(files) == NUM_MODEL_FILES.get(name, 4)
    assert [file for file in files if file not in note] == []


def test_a_slider_is_a_plain_number_in_the_api_graph(server, view):
    view.open(with_tiny_files(template(server, "two_sub_prompt_sliders")))
    view.set_widget("EditSlidersSubInstructionStrengths", "strength_2", -0.25)
    graph = view.prompt()
    inputs = graph[only(graph, "EditSlidersSubInstructionStrengths")]["inputs"]
    assert (inputs["strength_1"], inputs["strength_2"], inputs["strength_3"]) == (0.4, -0.25, 1)


def test_a_strength_accepts_a_link(server, view):
    view.open(with_tiny_files(template(server, "strength_sweep")))
    graph = view.prompt()
    strength = graph[only(graph, "EditSlidersSubInstructionStrengths")]["inputs"]["strength_1"]
    assert strength == [only(graph, "EditSlidersStrengthRange"), 0]


def test_nodes_show_the_adapter_and_the_instructions_after_a_run(server, view):
    workflow = with_tiny_files(template(server, "two_sub_prompt_sliders"))
    scale = next(node for node in workflow["nodes"] if node["type"] == "FluxKontextImageScale")
    scale["mode"] = 4  # bypassed
    view.open(workflow)
    view.run()
    view.wait_until_shown("STLoRA, acts on the instructions you choose")
    view.wait_until_shown("2  make her hair golden  [4 tokens]")
    graph = view.prompt()
    assert set(graph[only(graph, "EditSlidersLoadAdapter")]["inputs"]) == {"adapter_name"}
    assert view.saved_values("EditSlidersLoadAdapter") == ["selective_lora.pt"]


def test_nodes_show_the_inversion_and_the_cached_source_after_a_run(server, view):
    for name, text in (
        ("photograph_edit", "nudging 1.15, refinements 0"),
        ("remembered_source", "of keys and values in RAM"),
    ):
        workflow = with_tiny_files(template(server, name))
        for node in workflow["nodes"]:
            if node["type"] == "FluxKontextImageScale":
                node["mode"] = 4  # bypassed
        view.open(workflow)
        view.run()
        view.wait_until_shown(text)
    assert view.errors == []


def test_every_node_has_a_help_page_with_all_its_inputs(server):
    info = {name: node for name, node in server.object_info().items() if name.startswith(OURS)}
    for name, node in info.items():
        page = server.get(f"/extensions/{PACK}/docs/{name}.md").decode()
        assert page.startswith(f"# {node['display_name']}\n")
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        hidden = {f"strength_{k}" for k in range(2, 50)}  # strength_1 ... strength_50
        labels = [spec[1].get("display_name", key) for key, spec in inputs.items() if key not in hidden]
        assert [label for label in labels if label not in page] == [], name
        for image in re.findall(r"!\[.*?\]\((.+?)\)", page):
            Image.open(io.BytesIO(server.get(f"/extensions/{PACK}/docs/{image}"))).load()


def test_the_readme_lists_every_node_and_template_and_its_images_exist(server):
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for name, node in server.object_info().items():
        if name.startswith(OURS):
            assert node["display_name"] in readme, name
    assert all(name in readme for name in NAMES)
    images = [line.split("](")[1].rstrip(")") for line in readme.splitlines() if line.startswith("![")]
    assert images
    assert all((REPO / urllib.parse.unquote(image)).is_file() for image in images)
