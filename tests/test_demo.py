"""The demo finds the user's models, and its graph for them is one that ComfyUI accepts."""

from __future__ import annotations

import sys

import pytest
from conftest import REPO

sys.path.append(str(REPO / "demo"))

from graph import PICTURE, strip_graph
from models import TINY, users_models

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


def test_users_models(models):
    found, missing = users_models(models)
    assert missing == []
    assert found is not None
    assert not found.tiny
    assert found.model.replace("\\", "/") == FILES["unet"]
    assert (found.clip_l, found.t5xxl, found.vae, found.adapter) == tuple(list(FILES.values())[1:])
    (models / "vae" / "ae.safetensors").unlink()
    found, missing = users_models(models)
    assert found is None
    assert missing == ["vae/ae.safetensors"]


def test_graph_for_the_users_models(server, models):
    """Accepted by the server's validation; it then stops at the empty model file."""
    for folder, name in FILES.items():
        target = server.base / "models" / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.touch()
    found, _ = users_models(models)
    result = server.run(strip_graph(found, "photo.png", "make it red", 0.5))
    assert result.error["node_type"] in ("UNETLoader", "DualCLIPLoader", "VAELoader")


def test_tiny_graph(server):
    result = server.run(strip_graph(TINY, "photo.png", "make it red", 0.5))
    assert result.ok, result.error
    assert len(result.images(PICTURE)) == 1
