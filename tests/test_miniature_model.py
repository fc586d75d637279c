"""The miniature model's kept weights: small, and they do what they are told on scenes that they have never seen."""

from __future__ import annotations

import json

import pytest
from conftest import REPO

from training.miniature import model, transformer

MODELS = REPO / "demo" / "miniature"
SCENES = 40


@pytest.mark.parametrize(("edits_at_once", "least"), [(1, 0.95), (2, 0.9)])
def test_it_does_what_it_is_told(edits_at_once, least):
    found = model.examine(MODELS, SCENES, edits_at_once)
    assert found.right["all"] >= least, found


def test_it_is_small():
    assert sum(file.stat().st_size for file in MODELS.rglob("*.safetensors")) < 25 * 2**20


def test_its_curve_is_kept():
    lines = (REPO / "training" / "miniature" / "curves" / "transformer.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    assert points[-1]["step"] == transformer.STEPS
    assert points[-1]["loss"] < 0.1 * points[0]["loss"]
