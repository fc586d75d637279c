"""The parts of the miniature model before training: training data, losses and evaluation."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import comfy.sd
import numpy as np
import pytest
import torch
import yaml
from conftest import REPO
from PIL import Image

from training.config import TrainingConfig, read_config
from training.edit_strips import read_edit_strips
from training.examples import read_examples
from training.miniature.autoencoder import Autoencoder, scene_to_tensor
from training.miniature.dataset import FIRST_SEED, write_dataset
from training.miniature.edits import VALIDATION_SEEDS, apply_edits, random_edits
from training.miniature.evaluate import evaluate_images, render_tasks, validation_tasks
from training.miniature.latent_bank import encode_tasks, load_training_samples
from training.miniature.synthetic_scenes import coverage, draw_scene, random_scene, scene_image
from training.miniature.text_encoders import ENCODER_OPTIONS, T5TokenClassifier, TextEncoders, random_clip_l
from training.miniature.train_loop import train_module
from training.miniature.transformer import TransformerTraining, random_model
from training.rng import generator

CONFIGS = sorted((REPO / "training" / "miniature" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder()


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    return TextEncoders(T5TokenClassifier().weights(), random_clip_l())


def tasks(count: int, edits_each: int = 2):
    return validation_tasks(count, edits_each)


def test_the_encoder_equals_its_linear_map(autoencoder):
    pixels = torch.stack([scene_to_tensor(source) for source, _ in tasks(8)])
    with torch.no_grad():
        layer_by_layer = autoencoder.encoder(pixels)
    latents = autoencoder.encode(pixels)
    assert latents.shape == (8, 16, 8, 8)
    assert torch.allclose(layer_by_layer, latents, atol=1e-4)
    assert 0.3 < latents.std() < 0.7


def test_the_latents_keep_nearly_everything(autoencoder):
    """The best linear reconstruction of an image's cells from its latents."""
    pixels = torch.stack([scene_to_tensor(source) for source, _ in tasks(40)])
    cells = torch.nn.functional.pixel_unshuffle(pixels, 8).movedim(1, -1).flatten(0, -2)
    latents = autoencoder.encode(pixels).movedim(1, -1).flatten(0, -2)
    known = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    back = known @ torch.linalg.lstsq(known, cells).solution
    assert (back - cells).pow(2).mean().sqrt() < 0.03


def test_the_text_encoders_equal_comfyui_s(encoders):
    weights = [random_clip_l(), T5TokenClassifier().weights()]
    clip = comfy.sd.load_text_encoder_state_dicts(
        weights, clip_type=comfy.sd.CLIPType.FLUX, model_options=copy.deepcopy(ENCODER_OPTIONS)
    )
    for rows, prompt in ((20, "make the circle red"), (32, "shrink the square and paint the background gray")):
        tokens = clip.tokenize(prompt, tokenizer_options={"t5xxl_min_length": rows})
        with torch.no_grad():
            states, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
        found = encoders.encode([prompt], rows)
        assert states.shape == found.states.shape == (1, rows, 64)
        assert torch.allclose(states, found.states, atol=1e-3)
        assert torch.allclose(pooled, found.pooled, atol=1e-3)


def test_tokens_are_labeled_with_the_edit_of_their_instruction():
    reader = T5TokenClassifier()
    tokens, meanings = reader.samples(3)
    for ids, told in zip(tokens[:8], meanings[:8]):
        words = [reader.tokenizer.decode([token]) for token in ids]
        written = told != 20
        assert not written[ids == 0].any()
        assert not any(written[k] for k, word in enumerate(words) if word == "and")
        colors = {word: int(told[k]) for k, word in enumerate(words) if word in ("red", "green", "blue")}
        assert all(meaning in (place, place + 6) for word, meaning in colors.items() for place in [_COLOR[word]])


_COLOR = {"red": 0, "green": 1, "blue": 2}


def near(latent: torch.Tensor, exact: torch.Tensor) -> bool:
    """Up to float16 rounding: a matrix product sums in another order for a batch than for one image, so a value may
    round to the neighboring float16 (2**-10 of it), or differ absolutely by float32 noise where it is almost 0."""
    return torch.allclose(latent.float(), exact, rtol=2**-10, atol=1e-5)


def test_samples_are_exact_and_kept(autoencoder, tmp_path):
    chosen = tasks(6)
    made = encode_tasks(autoencoder, chosen)
    for k, (source, asked) in enumerate(chosen):
        target = apply_edits(source, asked, [1.0, 1.0])
        assert near(made.targets[k], autoencoder.encode(scene_to_tensor(target)[None])[0])
        assert near(made.sources[k], autoencoder.encode(scene_to_tensor(source)[None])[0])
        inside = coverage(target, "circle") > 0
        cells = made.objects[k, 0].repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
        assert cells[inside].all()
        assert made.instructions[k] == tuple(edit.instruction for edit in asked)
    first = load_training_samples(tmp_path, autoencoder, 1)
    again = load_training_samples(tmp_path, autoencoder, 1)
    assert len(first.instructions) == len(first.sources) == 1000
    assert torch.equal(first.targets, again.targets)
    assert first.instructions == again.instructions


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    def lesson(folder, seed, stop_at=-1):
        torch.manual_seed(seed)
        module = torch.nn.Linear(3, 1)

        def loss(step):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=generator("x", step))
            return (module(x) - x.sum(1, keepdim=True)).pow(2).mean()

        train_module(folder, module, torch.optim.AdamW(module.parameters(), lr=0.1), loss, 400, save_every=150)
        return module.weight

    whole = lesson(tmp_path / "whole", 0)
    with pytest.raises(KeyboardInterrupt):
        lesson(tmp_path / "stopped", 0, stop_at=220)
    assert torch.equal(lesson(tmp_path / "stopped", 1), whole)
    points = [json.loads(line) for line in (tmp_path / "stopped" / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [100, 200, 300, 400]
    assert points[-1]["loss"] < 0.1 * points[0]["loss"]


def test_the_random_transformer_predicts_its_input(autoencoder, encoders):
    frozen = random_model()
    noise = torch.randn(2, 16, 8, 8, generator=generator("noise"))
    text = encoders.encode(["make the circle red", ""], 20)
    with torch.no_grad():
        said = frozen.velocity(noise, torch.ones(2), text, 3.5, [noise])
    assert torch.nn.functional.cosine_similarity(said.flatten(), noise.flatten(), 0) > 0.99


def test_its_loss_falls(autoencoder, encoders):
    """A few steps on few samples; the same step gives the same loss."""
    frozen = random_model()
    training = TransformerTraining(frozen, encoders, encode_tasks(autoencoder, tasks(4)))
    optimizer = torch.optim.AdamW(frozen.network.parameters(), lr=2e-3)
    losses = []
    with frozen.patched({}):
        assert training.loss(0).item() == training.loss(0).item()
        for step in range(16):
            losses.append(training.loss(step))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


def test_evaluation_tells_right_from_wrong():
    chosen = tasks(12, 1)
    right = evaluate_images(
        np.stack([draw_scene(apply_edits(source, asked, [1.0])) for source, asked in chosen]), chosen
    )
    assert set(right.success_rate.values()) == {1.0}
    assert set(right.error_rate.values()) == {0.0}
    nothing = evaluate_images(np.stack([draw_scene(source) for source, _ in chosen]), chosen)
    assert set(nothing.success_rate.values()) == {0.0}
    assert all(share == ("not edited" not in what) for what, share in nothing.error_rate.items())


def test_validation_scenes_are_not_trained_on():
    learned = {random_scene(generator(seed, "bank")) for seed in range(200)}
    assert not learned & {source for source, _ in tasks(200)}
    assert VALIDATION_SEEDS[0] > 999_999
    assert tasks(3) == tasks(3)
    assert all(len(asked) == 2 for _, asked in tasks(20))


def test_a_random_model_is_evaluated(autoencoder, encoders):
    chosen = tasks(3)
    pictures = render_tasks(random_model(), encoders, autoencoder, chosen, steps=2)
    assert pictures.shape == (3, 64, 64, 3)
    assert evaluate_images(pictures, chosen).success_rate["all"] == 0


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_of_its_adapters(file, tmp_path):
    """They are valid, have the text encoders' sizes, and read what write_dataset writes."""
    write_dataset(tmp_path / "dataset", num_scenes=4, num_strips=6)
    content = yaml.safe_load(file.read_text())
    assert content["model"]["text_encoder_options"] == ENCODER_OPTIONS
    path = content["data"]["path"]
    assert path.startswith("../../../training-output/miniature/dataset/")
    content["data"]["path"] = str(tmp_path / path.removeprefix("../../../training-output/miniature/"))
    written = tmp_path / file.name
    written.write_text(yaml.safe_dump(content))
    config: TrainingConfig = read_config(written)
    found = read_examples(config)
    assert len(found.validation) == 2
    if config.method == "projector":
        assert len(found.training) == 4
        strengths = sorted(target.strength for target in found.training[0].targets)
        assert strengths == pytest.approx([k / 6 for k in range(7)])
    else:
        assert len(found.training) == 10
        assert {len(example.instructions) for example in found.training} <= {1, 2, 3}


def test_edit_strips_go_from_the_source_to_the_edit(tmp_path):
    """The distance of each column from the source rises with the strength that the trainer reads."""
    write_dataset(tmp_path, num_scenes=1, num_strips=6)
    for strip in read_edit_strips(tmp_path / "edit_strips", max_kl=0.3, category_thresholds=False):
        with Image.open(strip.file) as row:
            source, *columns, edit = np.split(np.asarray(row, float), strip.num_columns, axis=1)
        pictured = random_scene(generator(FIRST_SEED + int(strip.file.stem), "stacks"))
        assert np.array_equal(source, np.asarray(scene_image(pictured), float))
        away = {strength: np.abs(columns[k - 1] - source).mean() for k, strength in strip.strengths.items()}
        assert away[0.0] == 0
        assert all(away[b] > away[a] for a, b in pairwise(sorted(away)))
        assert away[1.0] == np.abs(edit - source).mean()


def test_edits_are_visible():
    rng = generator(1, "visible")
    source = random_scene(rng)
    for edit in random_edits(rng, source, 3):
        assert np.abs(draw_scene(edit.at(source, 1.0)) - draw_scene(source)).max() > 0.1
