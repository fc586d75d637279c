"""The miniature model's shipped weights: small, and they edit unseen scenes as instructed."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file

from training.frozen_model import FrozenModel
from training.miniature import model, transformer
from training.miniature.autoencoder import Autoencoder
from training.miniature.evaluate import validation_tasks
from training.miniature.latent_bank import encode_tasks
from training.miniature.text_encoders import TextEncoders

MODELS = REPO / "demo" / "miniature"
CURVE = REPO / "training" / "miniature" / "curves" / "transformer.jsonl"
SCENES = 40


@pytest.mark.parametrize(("edits_at_once", "least"), [(1, 0.95), (2, 0.9)])
def test_it_follows_instructions(edits_at_once, least):
    found = model.evaluate(MODELS, SCENES, edits_at_once)
    assert found.success_rate["all"] >= least, found


def test_its_loss_is_that_of_its_training():
    frozen = FrozenModel.load(MODELS / model.TRANSFORMER, "float32", gradient_checkpointing=False)
    encoders = TextEncoders(load_file(MODELS / model.T5), load_file(MODELS / model.CLIP_L))
    training = transformer.TransformerTraining(frozen, encoders, encode_tasks(Autoencoder(), validation_tasks(20, 2)))
    with torch.no_grad(), frozen.patched({}):
        losses = [training.loss(step).item() for step in range(8)]
    points = [json.loads(line) for line in CURVE.read_text().splitlines()]
    assert sum(losses) / len(losses) < 3 * points[-1]["loss"]


def test_it_is_small():
    assert sum(file.stat().st_size for file in MODELS.rglob("*.safetensors")) < 25 * 2**20


def test_its_loss_curve_is_kept():
    points = [json.loads(line) for line in CURVE.read_text().splitlines()]
    assert points[-1]["step"] == transformer.STEPS
    assert points[-1]["loss"] < 0.1 * points[0]["loss"]
