"""The demo finds the user's models, and its graph for them is one that ComfyUI accepts."""

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


def test_user_models(models):
    found, missing = find_user_models(models)
    assert missing == []
    assert found is not None
    assert not found.miniature
    assert found.model.replace("\\", "/") == FILES["unet"]
    assert (found.clip_l, found.t5xxl, found.vae, found.adapter) == tuple(list(FILES.values())[1:])
    (models / "vae" / "ae.safetensors").unlink()
    found, missing = find_user_models(models)
    assert found is None
    assert missing == ["vae/ae.safetensors"]


def test_graph_for_the_users_models(server, models):
    """Accepted by the server's validation; it then stops at the empty model file."""
    for folder, name in FILES.items():
        target = server.base / "models" / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.touch()
    found, _ = find_user_models(models)
    result = server.run(edit_graph(found, "photo.png", ["make it red"], [0.5]))
    assert result.error["node_type"] in ("UNETLoader", "DualCLIPLoader", "VAELoader")


def test_its_pictures_and_its_page(tmp_path):
    """All that `run.py demo` draws without models of the user's."""
    with server_with_miniature(COMFYUI, tmp_path) as running:
        running.put_input(SCENE.name, Image.open(SCENE))
        shown = render_miniature(running, tmp_path)
    page = write_page(tmp_path / "index.html", shown).read_text(encoding="utf-8")
    for one in shown:
        assert f'src="{one.file.name}"' in page
        Image.open(one.file).load()
    [moving] = [one.file for one in shown if one.file.suffix == ".webp"]
    assert Image.open(moving).n_frames > len(ANIMATION_STRENGTHS) / 2  # equal neighbours are one frame
    with Image.open(tmp_path / "one-slider.png") as strip:
        changes = [changed(strip, k) for k in range(len(STRENGTHS))]
    assert tuple(sorted(STRENGTHS)) == STRENGTHS
    assert min(np.diff(changes)) > -0.002
    assert changes[0] < changes[-1] / 2
    with Image.open(tmp_path / "calibrated.png") as sheet:
        uneven, even = ([changed(sheet, k, row) for k in range(len(FIVE))] for row in range(2))
    assert off_the_line(even) < off_the_line(uneven) / 2


def off_the_line(changes: list[float]) -> float:
    """Mean distance of changes at even strengths from the straight line between the first and the last."""
    line = np.linspace(changes[0], changes[-1], len(changes))
    return float(np.abs(changes - line).mean())


def changed(sheet: Image.Image, k: int, row: int = 0) -> float:
    """How far the k-th picture of a row is from the scene, mean over the pixels."""
    left, top = k * (MIN_SIZE + GAP), row * (MIN_SIZE + CAPTION_HEIGHT)
    panel = sheet.convert("RGB").crop((left, top, left + MIN_SIZE, top + MIN_SIZE))
    scene = Image.open(SCENE).convert("RGB").resize(panel.size, Image.Resampling.BICUBIC)
    return float(np.abs(np.asarray(panel, float) - np.asarray(scene, float)).mean() / 255)


def test_the_workflow_of_the_browser_edits_too(tmp_path, chromium):
    """What --open offers, listed and run by the page."""
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
        [shown] = [key for key, node in queued.items() if node["class_type"] == "SaveImage"]
        result = running.run(queued)
        assert result.ok, result.error
        assert page.errors == []
        page.close()
        [picture] = result.images(shown)
    found = read_attributes(np.asarray(picture.convert("RGB"), np.float32) / 255, source)
    assert abs(reached_strength(edits[0], source, found)) < 0.1
    assert reached_strength(edits[1], source, found) > 0.9
