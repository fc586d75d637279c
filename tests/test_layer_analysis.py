"""Vitality search and attention maps: known results, resumed runs, and a model that stays unchanged."""

from __future__ import annotations

import json
import math
import os

import comfy.sample
import comfy.sd
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import near
from support.stable_flow import LATENT, TEXT_TOKENS, batched_text, edit_text, source_text
from support.tiny_models import tiny_vae

from slider_core.errors import SliderError
from slider_core.figures.plots import attention_plot, vitality_plot
from slider_core.sampling.sampling_settings import SamplingSettings
from slider_core.stable_flow import vitality_search
from slider_core.stable_flow.attention_maps import AttentionMaps, measure_attention
from slider_core.stable_flow.vitality_search import (
    LATENT_FEATURES,
    RenderPlan,
    VitalityScores,
    choose_features,
    measure_vitality,
)

EMPTY = torch.zeros(LATENT)


def model_with_one_vital_layer(layer: int, recipe, manifest):
    """The golden model with the output weights of all blocks but one scaled by 0.05."""
    weights = recipe.flux_weights(manifest["model"])
    depth = manifest["model"]["depth"]
    prefix = f"double_blocks.{layer}." if layer < depth else f"single_blocks.{layer - depth}."
    for key in weights:
        if key.endswith(("attn.proj.weight", "mlp.2.weight", "linear2.weight")) and not key.startswith(prefix):
            weights[key] *= 0.05
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})


def vision_model(kind: str, projection_dim: int = 16) -> ClipVisionModel:
    """A tiny vision model with random weights."""
    config = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": False,
    }
    if kind == "clip_vision_model":
        config["projection_dim"] = projection_dim
    model = ClipVisionModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def analyze(model, folder, name="s", features=LATENT_FEATURES, prompts=None, seeds=(3,), **more) -> VitalityScores:
    prompts = prompts or {"one": source_text(), "two": edit_text(1)}
    plan = RenderPlan(prompts, seeds, EMPTY, 2)
    return measure_vitality(model, plan, features, f"{folder}/{name}", {"compared by": "test"}, **more)


@pytest.mark.parametrize("layer", [1, 5])
@pytest.mark.parametrize("kind", [None, "clip_vision_model", "dinov2", "siglip_vision_model"])
def test_vital_layer_is_detected(recipe, manifest, tmp_path, layer, kind):
    features = choose_features(tiny_vae(), vision_model(kind)) if kind else LATENT_FEATURES
    scores = analyze(model_with_one_vital_layer(layer, recipe, manifest), tmp_path, "s", features)
    assert scores.most_vital(1) == [layer]
    others = [scores.vitality(k) for k in range(7) if k != layer]
    assert scores.vitality(layer) > 2 * max(others)
    assert scores.above((scores.vitality(layer) + max(others)) / 2) == [layer]


def test_scores_are_similarities_to_renders_with_a_bypassed_layer(golden_model, tmp_path):
    """One score computed by hand, with the layer's block bypassed by ComfyUI's own block replacement."""
    scores = analyze(golden_model, tmp_path, "s", prompts={"one": source_text()})
    bypassed = golden_model.clone()
    bypassed.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 2)

    def sampled(model) -> torch.Tensor:
        start = comfy.sample.prepare_noise(EMPTY, 3)
        text = source_text()
        return comfy.sample.sample(
            model, start, 2, 1.0, "euler", "simple", text, text, EMPTY, disable_pbar=True, seed=3
        )

    expected = torch.cosine_similarity(sampled(golden_model).flatten(), sampled(bypassed).flatten(), dim=0)
    assert scores.similarity(5) == pytest.approx(float(expected), abs=1e-5)
    assert scores.vitality(5) == pytest.approx(1 - float(expected), abs=1e-5)


def test_selection_and_scores_file(golden_model, tmp_path):
    scores = analyze(golden_model, tmp_path, "s", seeds=(3, 4))
    order = sorted(range(7), key=scores.vitality, reverse=True)
    assert scores.most_vital(3) == sorted(order[:3])
    assert scores.above(scores.vitality(order[2])) == sorted(order[:3])
    [file] = tmp_path.iterdir()
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content == json.loads(scores.as_json())
    assert list(content["vitality"]) == [str(k) for k in range(7)]
    assert set(content["similarities"]["0"]) == {"one (3)", "one (4)", "two (3)", "two (4)"}


class Stop(Exception):
    pass


def test_interrupted_run_is_resumed(golden_model, tmp_path):
    uninterrupted, renders = analyze(golden_model, tmp_path, "uninterrupted"), []

    def stop_after_11(done: int, total: int, latent: torch.Tensor) -> None:
        renders.append((done, total))
        if done == 11:
            raise Stop

    with pytest.raises(Stop):
        analyze(golden_model, tmp_path, "interrupted", on_image=stop_after_11)
    assert renders == [(k, 16) for k in range(1, 12)]
    resumed_renders = []
    resumed = analyze(
        golden_model, tmp_path, "interrupted", on_image=lambda *counts: resumed_renders.append(counts[:2])
    )
    assert resumed_renders == [(k, 16) for k in (1, 9, 11, 12, 13, 14, 15, 16)]
    assert resumed.similarities == uninterrupted.similarities
    resumed_renders.clear()
    analyze(golden_model, tmp_path, "interrupted", on_image=lambda *counts: resumed_renders.append(counts[:2]))
    assert resumed_renders == [(1, 16)]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("unpatch_golden_model")
def test_changed_models_and_prompts_are_detected(golden_model, tmp_path):
    """LoRAs, text encoders and vision models are not among the settings, but change the scores."""
    patched, key = golden_model.clone(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    patched.add_patches({key: ("diff", (0.05 * noise(768, 256, seed=3),))})
    changed_prompts = {"one": edit_text(2), "two": edit_text(1)}
    other_features = choose_features(tiny_vae(), vision_model("dinov2"))
    for model, more in (
        (patched, {}),
        (golden_model, {"prompts": changed_prompts}),
        (golden_model, {"features": other_features}),
    ):
        analyze(golden_model, tmp_path, "s")
        reused_name = analyze(model, tmp_path, "s", **more)
        new_name = analyze(model, tmp_path, "new", **more)
        assert reused_name.similarities == new_name.similarities
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.parametrize("more", [{"steps": 3}, {"latent": torch.zeros(1, 16, 8, 12)}, {"settings": {"guidance": 2}}])
def test_each_setting_has_its_own_file(golden_model, tmp_path, more):
    inputs = {"steps": 2, "latent": EMPTY, "settings": {"guidance": 1}}

    def run(steps: int, latent: torch.Tensor, settings: dict) -> VitalityScores:
        plan = RenderPlan({"one": source_text()}, [3], latent, steps)
        return measure_vitality(golden_model, plan, LATENT_FEATURES, f"{tmp_path}/s", settings)

    run(**inputs)
    run(**inputs | more)
    assert len(list(tmp_path.iterdir())) == 2


def test_each_seed_has_its_own_noise(golden_model, tmp_path):
    scores = analyze(golden_model, tmp_path, "s", seeds=(3, 4))
    assert scores.similarities[0]["one (3)"] != scores.similarities[0]["one (4)"]


def test_scores_are_written_atomically(golden_model, tmp_path, monkeypatch):
    scores = analyze(golden_model, tmp_path, "s")
    [file] = tmp_path.iterdir()
    before = file.read_text(encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    del scores.similarities[0]["one (3)"]
    with pytest.raises(SliderError, match="No space left on device"):
        vitality_search._save_scores(file, scores)
    assert file.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [file]


def test_other_settings_and_damaged_files_start_over(golden_model, tmp_path):
    analyze(golden_model, tmp_path, "s")
    [file] = tmp_path.iterdir()
    rendered = []
    analyze(golden_model, tmp_path, "s", seeds=(8,), on_image=lambda *_: rendered.append(1))
    assert len(rendered) == 16
    assert len(list(tmp_path.iterdir())) == 2
    for damage in ("", "{}", "[]", '{"similarities": {"a": {}}}', file.read_text()[:300]):
        file.write_text(damage)
        rendered.clear()
        analyze(golden_model, tmp_path, "s", on_image=lambda *_: rendered.append(1))
        assert len(rendered) == 16


def test_errors_of_the_search(golden_model, tmp_path):
    with pytest.raises(SliderError, match="There are no prompts"):
        measure_vitality(golden_model, RenderPlan({}, [1], EMPTY, 2), LATENT_FEATURES, f"{tmp_path}/s", {})
    (tmp_path / "file").touch()
    with pytest.raises(SliderError, match=r"scores cannot be written to .* Free some disk"):
        analyze(golden_model, tmp_path / "file")
    scores = VitalityScores({}, {0: {"a": 0.9}, 1: {"a": 0.5}})
    for count in (0, 3):
        with pytest.raises(SliderError, match=f"top_k is {count}; expected 1 to 2"):
            scores.most_vital(count)
    with pytest.raises(SliderError, match=r"No layer has a vitality of at least 0\.6; the highest is 0\.5000"):
        scores.above(0.6)


def test_vitality_plot():
    scores = VitalityScores({"compared by": "a test"}, {k: {"a": 1 - 0.1 * k} for k in range(7)})
    plot, other = (vitality_plot(scores.mean_similarities(), vital, scores.describe()) for vital in ([5, 6], [1]))
    assert plot.shape == (1, 500, 1100, 3)
    assert 0 <= float(plot.min()) < 0.5 < float(plot.max()) <= 1
    assert not torch.equal(plot, other)


# --- attention maps


def view_attention(model, text=None, latent=EMPTY, batch_index: int = 0, point=(0.3, 0.9), steps: int = 2):
    start = comfy.sample.prepare_noise(EMPTY, 3).repeat(latent.shape[0], 1, 1, 1)
    return measure_attention(
        model, text or source_text(), latent, start, SamplingSettings(steps, 3), batch_index, point
    )


def test_maps_equal_softmax_attention(golden_model, monkeypatch):
    """Attention computed by hand from the q and k that reach ComfyUI's attention function."""
    calls = []
    import comfy.ldm.flux.math as flux_math

    original = flux_math.optimized_attention

    def attention(q, k, v, heads, **options):
        calls.append((q, k))
        return original(q, k, v, heads, **options)

    monkeypatch.setattr(flux_math, "optimized_attention", attention)
    maps, _ = view_attention(golden_model, steps=1)
    token = TEXT_TOKENS + 3 * 4 + 1  # 4 x 4 image tokens; x 0.3, y 0.9
    assert list(maps.image) == list(range(7))
    for layer, (q, k) in enumerate(calls):
        scores = torch.einsum("hd,hnd->hn", q[0, :, token], k[0]) / math.sqrt(q.shape[-1])
        expected = scores.softmax(-1).mean(0)
        assert maps.text[layer] == pytest.approx(float(expected[:TEXT_TOKENS].sum()), abs=1e-5)
        assert torch.allclose(maps.image[layer].flatten(), expected[TEXT_TOKENS:], atol=1e-5)


def test_text_and_image_fractions_sum_to_one(golden_model):
    maps, samples = view_attention(golden_model)
    assert samples.shape == LATENT
    for layer in range(7):
        assert maps.text[layer] + float(maps.image[layer].sum()) == pytest.approx(1, abs=1e-5)
    assert maps.mean_text([1, 4]) == pytest.approx((maps.text[1] + maps.text[4]) / 2)
    assert float(maps.mean_image([1, 4]).sum()) == pytest.approx(1 - maps.mean_text([1, 4]), abs=1e-5)
    reference = {"reference_latents": [noise(1, 16, 8, 4, seed=5)], "reference_latents_method": "offset"}
    with_reference, _ = view_attention(golden_model, source_text(**reference))
    assert with_reference.text[0] + float(with_reference.image[0].sum()) < 0.99
    assert with_reference.image[0].shape == (4, 4)


def test_image_of_a_batch(golden_model):
    batch, samples = view_attention(golden_model, batched_text(), EMPTY.repeat(3, 1, 1, 1), batch_index=2)
    alone, alone_samples = view_attention(golden_model, edit_text(2))
    assert near(samples[2:], alone_samples)
    for layer in range(7):
        assert torch.allclose(batch.image[layer], alone.image[layer], atol=1e-4)


def test_measuring_attention_does_not_change_the_result(golden_model):
    start, text = comfy.sample.prepare_noise(EMPTY, 3), source_text()
    inputs = (start, 2, 1.0, "euler", "simple", text, text, EMPTY)
    before = comfy.sample.sample(golden_model, *inputs, disable_pbar=True, seed=3)
    _, samples = view_attention(golden_model)
    assert torch.equal(samples, before)
    assert torch.equal(comfy.sample.sample(golden_model, *inputs, disable_pbar=True, seed=3), before)


def test_errors_of_attention_maps(golden_model):
    with pytest.raises(SliderError, match=r"batch_index is 1, but the batch has 1 image\(s\); expected 0 to 0"):
        view_attention(golden_model, batch_index=1)
    with pytest.raises(SliderError, match=r"compiled \(torch.compile\)"):
        view_attention(compiled(golden_model))


def test_attention_plot():
    maps = AttentionMaps({k: 0.1 * k for k in range(7)}, {k: torch.rand(4, 4) / 16 for k in range(7)}, 1)
    image = torch.rand(64, 64, 3)
    plots = [attention_plot(maps, image, (0.3, 0.9), vital) for vital in ([1, 2], [6], list(range(7)))]
    for plot in plots:
        assert plot.shape == (1, 800, 1200, 3)
    assert not torch.equal(plots[0], plots[1])


def test_model_is_unchanged_after_the_search(golden_model, tmp_path):
    x = noise(*LATENT, seed=4)
    before = velocity_of(golden_model, x, 0.5, source_text())
    analyze(golden_model, tmp_path, "s")
    assert torch.equal(velocity_of(golden_model, x, 0.5, source_text()), before)
