"""Sliders on the miniature model, measured in its images, on unseen scenes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COMFYUI, REPO
from PIL import Image
from support.comfy_server import ComfyServer

from slider_core.conditioning.mask_and_schedule import apply_mask_and_schedule
from training.miniature.edits import Edit
from training.miniature.evaluate import validation_tasks
from training.miniature.read_attributes import reached_strength, read_attributes
from training.miniature.slider_methods import METHODS, Miniature
from training.miniature.synthetic_scenes import SIDE, Scene, SceneAttributes, coverage, draw_scene, scene_image

sys.path.append(str(REPO / "demo"))

from models import MINIATURE, MINIATURE_FOLDER
from show import server_with_miniature
from test_templates import only, template, without_upscaling

SCENES = 6
UP = (0.0, 0.25, 0.5, 0.75, 1.0)
ADAPTERS = ("STLoRA", "GSTLoRA", "strength projector")
WITHOUT_ADAPTER = ("token interpolation", "Velocity Blending", "FlowSlider", "Prompt Difference")


@pytest.fixture(scope="module")
def it() -> Miniature:
    return Miniature(MINIATURE_FOLDER)


def reached(it: Miniature, name: str, source: Scene, edits: Sequence[Edit], strengths: Sequence[float]) -> np.ndarray:
    """The reached strength of each edit at strengths of the first one: (strengths, edits)."""
    pictures = it.render(source, METHODS[name](it, edits, 0, strengths), len(strengths))
    return np.array(
        [[reached_strength(edit, source, read_attributes(picture, source)) for edit in edits] for picture in pictures]
    )


@pytest.mark.parametrize("name", ADAPTERS + WITHOUT_ADAPTER)
def test_it_fades_in(it, name):
    """Strength 0 suppresses the edit, 1 applies it, and in between it never decreases."""
    for source, edits in validation_tasks(SCENES, 1):
        values = reached(it, name, source, edits, UP)[:, 0]
        assert abs(values[0]) < 0.1, (edits, values)
        assert values[-1] > 0.9, (edits, values)
        assert np.diff(values).min() > -0.05, (edits, values)
        assert 0.02 < values[1:-1].mean() < 0.98, (edits, values)


@pytest.mark.parametrize("name", ["STLoRA", "Velocity Blending", "FlowSlider", "Prompt Difference"])
def test_more_than_one_exaggerates(it, name):
    tasks = [(source, edits) for source, edits in validation_tasks(40, 1) if edits[0].attribute == "background"]
    values = np.array([reached(it, name, source, edits, (1.0, 1.5))[:, 0] for source, edits in tasks[:SCENES]])
    assert (values[:, 1] - values[:, 0]).mean() > 0.05, values


@pytest.mark.parametrize("name", ["Velocity Blending", "FlowSlider", "Prompt Difference"])
def test_half_of_it_is_half_of_the_edit(it, name):
    for source, edits in validation_tasks(SCENES, 1):
        assert abs(reached(it, name, source, edits, (0.5,))[0, 0] - 0.5) < 0.2, edits


@pytest.mark.parametrize("name", ["STLoRA", "token interpolation", "Prompt Difference"])
def test_the_other_instruction_stays(it, name):
    for source, edits in validation_tasks(SCENES, 2):
        values = reached(it, name, source, edits, UP)
        assert abs(values[0, 0]) < 0.1 < 0.9 < values[-1, 0], (edits, values)
        assert abs(values[:, 1] - values[-1, 1]).max() < 0.1, (edits, values)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_mask_keeps_the_edit_in_its_half(it, name):
    """An edit of the background with a mask of the half with the square, by the change of pixels."""
    tasks = [(source, edits) for source, edits in validation_tasks(60, 1) if edits[0].attribute == "background"]
    for source, edits in tasks[:3]:
        left = np.broadcast_to(np.arange(SIDE) < SIDE // 2, (SIDE, SIDE))
        half = left if source.square_center[0] < SIDE // 2 else ~left
        slid = METHODS[name](it, edits, 0, [1.0])
        full, masked = (
            it.render(source, slid._replace(positive=positive), 1)[0]
            for positive in (slid.positive, apply_mask_and_schedule(slid.positive, torch.tensor(half)))
        )
        wall = (coverage(source, "circle") + coverage(source, "square") == 0) & (edge_of_halves() > 6)
        went, goes = (np.linalg.norm(picture - draw_scene(source), axis=2) for picture in (masked, full))
        assert goes[wall & half].mean() > 0.1 < goes[wall & ~half].mean()
        assert went[wall & half].mean() > 0.7 * goes[wall & half].mean(), edits
        assert went[wall & ~half].mean() < 0.15 * goes[wall & ~half].mean(), edits


def edge_of_halves() -> np.ndarray:
    """Distance of each pixel from the line between left and right half, (SIDE, SIDE)."""
    return np.broadcast_to(np.abs(np.arange(SIDE) + 0.5 - SIDE / 2), (SIDE, SIDE))


@pytest.fixture(scope="module")
def miniature_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with server_with_miniature(COMFYUI, tmp_path_factory.mktemp("miniature")) as running:
        yield running


Graph = dict[str, dict[str, Any]]


def on_the_miniature(graph: Graph, picture: str, edits: Sequence[Edit]) -> Graph:
    """A template's graph with the miniature's files, an image and instructions; everything else is unchanged."""
    for node in graph.values():
        inputs = node["inputs"]
        match node["class_type"]:
            case "UNETLoader":
                inputs["unet_name"] = MINIATURE.model
            case "VAELoader":
                inputs["vae_name"] = MINIATURE.vae
            case "DualCLIPLoader":
                node["class_type"] = "SmallTextEncoders"
                node["inputs"] = {"clip_l": MINIATURE.clip_l, "t5xxl": MINIATURE.t5xxl, "rows": 512}
            case "LoadImage":
                inputs["image"] = picture
            case "EditSlidersLoadAdapter":
                kind = "gstlora" if "gstlora" in inputs["adapter_name"] else "stlora"
                inputs["adapter_name"] = f"miniature-{kind}.safetensors"
            case "EditSlidersLoadProjector":
                inputs["projector_name"] = "miniature-projector.safetensors"
                inputs["lora_name"] = "none, or in the projector's file"
            case "EditSlidersEncodeSubInstructions" | "EditSlidersSliderPrompt" | "EditSlidersPromptDifference":
                inputs["text"] = "\n".join(edit.instruction for edit in edits)
    return without_upscaling(graph)


STRENGTH_OF = {  # the template's node that has the strength of the first instruction, and its name there
    "single_slider": ("EditSlidersApplyGSTLoRA", "strength"),
    "strength_projector": ("EditSlidersProjectorStrength", "strength"),
    "two_sub_prompt_sliders": ("EditSlidersSubInstructionStrengths", "strength_1"),
    "slider_prompt": ("EditSlidersSliderPrompt", "strength_1"),
    "without_adapter": ("EditSlidersPromptDifference", "strength_1"),
}


@pytest.mark.parametrize("view", ["canvas"], indirect=True)
@pytest.mark.parametrize("name", STRENGTH_OF)
def test_the_templates_slide_over_the_api(view, server, miniature_server, name):
    """With 512 text tokens and all other settings of the template."""
    several = name in ("two_sub_prompt_sliders", "slider_prompt", "without_adapter")
    source, edits = validation_tasks(1, 2 if several else 1)[0]
    picture = miniature_server.put_input("scene.png", scene_image(source))
    view.open(template(server, name))
    graph = on_the_miniature(view.prompt(), picture, edits)
    node, strength = STRENGTH_OF[name]
    found = []
    for value in (0.0, 1.0):
        inputs = graph[only(graph, node)]["inputs"]
        inputs |= {strength: value, **({"strength_2": 1.0} if several else {})}
        looks = looks_of(miniature_server, graph, source)
        found.append([reached_strength(edit, source, looks[0]) for edit in edits])
    suppressed, applied = found
    assert abs(suppressed[0]) < 0.1, found
    assert applied[0] > 0.85, found
    assert all(abs(a - b) < 0.05 for a, b in zip(suppressed[1:], applied[1:])), found
    assert all(other > 0.9 for other in applied[1:]), found


@pytest.mark.parametrize("view", ["canvas"], indirect=True)
def test_the_sweep_template_fades_in_and_exaggerates(view, server, miniature_server):
    source, edits = next(task for task in validation_tasks(40, 1) if task[1][0].attribute == "background")
    picture = miniature_server.put_input("scene.png", scene_image(source))
    view.open(template(server, "strength_sweep"))
    graph = on_the_miniature(view.prompt(), picture, edits)
    values = [reached_strength(edits[0], source, looks) for looks in looks_of(miniature_server, graph, source)]
    assert abs(values[0]) < 0.1, values
    assert values[0] < values[1] < values[2] < values[3], values
    assert values[2] > 0.9, values
    assert values[3] > values[2] + 0.03, values


def looks_of(server: ComfyServer, graph: Graph, source: Scene) -> list[SceneAttributes]:
    """The attributes measured in the images of a graph."""
    result = server.run(graph)
    assert result.ok, result.error
    return [read_attributes(as_floats(picture), source) for picture in result.images(only(graph, "SaveImage"))]


def as_floats(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), np.float32) / 255
