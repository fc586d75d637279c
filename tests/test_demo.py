"""The demo: the search for the user's models, its graphs, images and page."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from conftest import COMFYUI, REPO
from PIL import Image
from support.browser import ComfyPage, write_settings

from slider_core.figures.contact_sheet import CAPTION_HEIGHT, GAP
from training.miniature.evaluate import validation_tasks
from training.miniature.read_attributes import reached_strength, read_attributes
from training.miniature.synthetic_scenes import scene_image

sys.path.append(str(REPO / "demo"))

from graph import edit_graph
from models import MINIATURE, find_user_models
from page import write_page
from show import ANIMATION_STRENGTHS, FIVE, MIN_SIZE, SCENE, STRENGTHS, render_miniature, server_with_miniature
from workflow import NAME, workflow

FILES = {
    "unet": "flux/flux1-dev-kontext_fp8_scaled.safetensors",
    "clip": "clip_l.safetensors",
    "text_encoders": "t5xxl_fp8_e4m3fn.safetensors",
    "vae": "ae.safetensors",
    "loras": "selective_lora.pt",
}


@pytest.fixture
def models(tmp_path):
    for folder, name in FILES.items():
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True)
        path.touch()
    return tmp_path


def test_find_user_models(models):
    user_models, missing = find_user_models(models)
    assert missing == []
    assert user_models is not None
    assert not user_models.miniature
    assert user_models.model.replace("\\", "/") == FILES["unet"]
    assert (user_models.clip_l, user_models.t5xxl, user_models.vae, user_models.adapter) == tuple(
        list(FILES.values())[1:]
    )
    (models / "vae" / "ae.safetensors").unlink()
    user_models, missing = find_user_models(models)
    assert user_models is None
    assert missing == ["vae/ae.safetensors"]


def test_graph_for_the_users_models(server, models):
    """The graph passes the server's validation; execution then fails at an empty model file."""
    for folder, name in FILES.items():
        target = server.base / "models" / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.touch()
    user_models, _ = find_user_models(models)
    result = server.run(edit_graph(user_models, "photo.png", ["make it red"], [0.5]))
    assert result.error["node_type"] in ("UNETLoader", "DualCLIPLoader", "VAELoader")


def test_images_and_page(tmp_path):
    """What `run.py demo` renders without the user's models."""
    with server_with_miniature(COMFYUI, tmp_path) as running:
        running.put_input(SCENE.name, Image.open(SCENE))
        rendered = render_miniature(running, tmp_path)
    page = write_page(tmp_path / "index.html", rendered).read_text(encoding="utf-8")
    for item in rendered:
        assert f'src="{item.file.name}"' in page
        Image.open(item.file).load()
    [animation] = [item.file for item in rendered if item.file.suffix == ".webp"]
    assert Image.open(animation).n_frames > len(ANIMATION_STRENGTHS) / 2  # equal neighbors are merged into one frame
    with Image.open(tmp_path / "one-slider.png") as strip:
        changes = [change_from_scene(strip, k) for k in range(len(STRENGTHS))]
    assert tuple(sorted(STRENGTHS)) == STRENGTHS
    assert min(np.diff(changes)) > -0.002
    assert changes[0] < changes[-1] / 2
    with Image.open(tmp_path / "calibrated.png") as sheet:
        uneven, even = ([change_from_scene(sheet, k, row) for k in range(len(FIVE))] for row in range(2))
    assert nonlinearity(even) < nonlinearity(uneven) / 2


def nonlinearity(changes: list[float]) -> float:
    """Mean absolute deviation of changes at even strengths from the straight line between the first and the last."""
    line = np.linspace(changes[0], changes[-1], len(changes))
    return float(np.abs(changes - line).mean())


def change_from_scene(sheet: Image.Image, k: int, row: int = 0) -> float:
    """Mean absolute difference (0 to 1) between the scene and the k-th image in a row of the sheet."""
    left, top = k * (MIN_SIZE + GAP), row * (MIN_SIZE + CAPTION_HEIGHT)
    panel = sheet.convert("RGB").crop((left, top, left + MIN_SIZE, top + MIN_SIZE))
    scene = Image.open(SCENE).convert("RGB").resize(panel.size, Image.Resampling.BICUBIC)
    return float(np.abs(np.asarray(panel, float) - np.asarray(scene, float)).mean() / 255)


def test_browser_workflow(tmp_path, chromium):
    """The workflow that --open offers is listed by the page, runs and edits."""
    source, edits = validation_tasks(1, 2)[0]
    with server_with_miniature(COMFYUI, tmp_path) as running:
        write_settings(tmp_path)
        running.put_input(SCENE.name, scene_image(source))
        graph = workflow(MINIATURE, SCENE.name, [edit.instruction for edit in edits])
        running.put_workflow(NAME, graph)
        assert f"{NAME}.json" in json.loads(running.get("/api/userdata?dir=workflows"))
        page = ComfyPage(chromium, running, vue=False)
        page.open(graph)
        page.set_widget("EditSlidersSliderPrompt", "strength_1", 0.0)
        page.set_widget("EditSlidersSliderPrompt", "strength_2", 1.0)
        queued = page.prompt()
        [save_node] = [key for key, node in queued.items() if node["class_type"] == "SaveImage"]
        result = running.run(queued)
        assert result.ok, result.error
        assert page.errors == []
        page.close()
        [image] = result.images(save_node)
    attributes = read_attributes(np.asarray(image.convert("RGB"), np.float32) / 255, source)
    assert abs(reached_strength(edits[0], source, attributes)) < 0.1
    assert reached_strength(edits[1], source, attributes) > 0.9
