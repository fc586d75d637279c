"""Inversion and trajectories: accuracy, source modes, files and errors; the paper's cases are in the golden tests."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import comfy.sd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import differ, near
from support.stable_flow import LATENT, batched_text, photo, sigmas_of, source_text

from slider_core.errors import SliderError
from slider_core.stable_flow.inversion import SourceMode, edit_from_trajectory, invert
from slider_core.stable_flow.trajectory import Trajectory, load_trajectory, save_trajectory
from slider_core.stable_flow.vital_layers import inject_key_values

PROMPT = "a “photo” of a cat 🐈"


def invert_photo(model, steps: int = 4, prompt: str = PROMPT, **more) -> Trajectory:
    return invert(model, source_text(guidance=1.0), photo(model), sigmas_of(model, steps), prompt, **more)


@pytest.fixture(scope="module")
def trajectory(golden_model) -> Trajectory:
    return invert_photo(golden_model)


def regeneration_error(model, **more) -> float:
    """Relative error of sampling the trajectory back, against the nudged source latent in the model's scale."""
    trajectory = invert_photo(model, **more)
    out = edit_from_trajectory(model, source_text(guidance=1.0), trajectory, SourceMode.CACHED)
    source = trajectory.latents[-1:]
    return float((model.model.latent_format.process_in(out) - source).norm() / source.norm())


def test_refinements_reduce_the_error(golden_model):
    errors = [regeneration_error(golden_model, steps=15, refinements=n) for n in range(4)]
    for coarse, fine in itertools.pairwise(errors):
        assert fine < 0.4 * coarse
    assert errors[3] < 0.01 < 0.1 < errors[0]


def test_refined_steps_are_exact_inverses(golden_model):
    """After enough refinements an Euler step from each latent returns the previous one."""
    trajectory = invert_photo(golden_model, refinements=40)
    for k in range(trajectory.steps):
        z, (sigma, following) = trajectory.latents[k : k + 1], trajectory.sigmas[k : k + 2].tolist()
        back = z + (following - sigma) * velocity_of(golden_model, z, sigma, source_text(guidance=1.0))
        assert near(back, trajectory.latents[k + 1 : k + 2])


def test_batch_of_prompts_uses_the_first(golden_model, trajectory):
    batched = invert(golden_model, batched_text((1.0, 1.0, 1.0)), photo(golden_model), trajectory.sigmas, PROMPT)
    assert near(batched.latents, trajectory.latents)
    assert torch.equal(batched.text, trajectory.text)
    assert torch.equal(batched.pooled, trajectory.pooled)
    assert len(batched.text) == len(batched.pooled) == 1


def test_source_modes(golden_model, trajectory):
    model, text = inject_key_values(golden_model, [0, 4]), batched_text((1.0, 3.0, 3.0))
    outs = {
        mode: edit_from_trajectory(model, text, trajectory, mode)
        for mode in (SourceMode.TRAJECTORY, SourceMode.PUBLISHED, SourceMode.CACHED)
    }
    source = golden_model.model.latent_format.process_out(trajectory.latents[-1:])
    assert near(outs[SourceMode.TRAJECTORY][:1], source)
    assert differ(outs[SourceMode.CACHED][:1], source)
    assert differ(outs[SourceMode.TRAJECTORY][1:], outs[SourceMode.PUBLISHED][1:])
    assert differ(outs[SourceMode.TRAJECTORY][1:], outs[SourceMode.CACHED][1:])


def test_torch_compile(golden_model, trajectory):
    torch._dynamo.reset()
    assert near(invert_photo(compiled(golden_model)).latents, trajectory.latents)


def test_progress(golden_model):
    calls = []
    invert_photo(
        golden_model, steps=3, refinements=2, on_step=lambda k, x0, x, n: calls.append((k, n, tuple(x0.shape)))
    )
    assert calls == [(0, 3, LATENT), (1, 3, LATENT), (2, 3, LATENT)]


def test_file_round_trip(trajectory, golden_model, tmp_path):
    path = tmp_path / "cat.safetensors"
    save_trajectory(trajectory, path)
    loaded = load_trajectory(path)
    for name in ("latents", "sigmas", "text", "pooled"):
        assert torch.equal(getattr(loaded, name), getattr(trajectory, name))
    for name in ("prompt", "nudging", "refinements"):
        assert getattr(loaded, name) == getattr(trajectory, name)
    loaded.check_model(golden_model)
    text = batched_text((1.0, 3.0, 3.0))
    assert near(edit_from_trajectory(golden_model, text, loaded), edit_from_trajectory(golden_model, text, trajectory))
    assert os.listdir(tmp_path) == ["cat.safetensors"]
    assert PROMPT in loaded.describe()
    assert "4 steps, 64 x 64 pixels" in loaded.describe()


def test_write_errors_keep_the_old_file(trajectory, tmp_path, monkeypatch):
    path = tmp_path / "cat.safetensors"
    save_trajectory(trajectory, path)
    content = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SliderError, match=r"cannot be written .*No space left on device.* Free some disk"):
        save_trajectory(shifted(trajectory), path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["cat.safetensors"]
    with pytest.raises(SliderError, match="cannot be written"):
        save_trajectory(trajectory, tmp_path / "missing" / "cat.safetensors")


def shifted(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, latents=trajectory.latents + 1)


def rewrite(path, **changes) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    for key, value in changes.items():
        target = tensors if isinstance(value, torch.Tensor) or key in tensors else header
        if value is None:
            del target[key]
        else:
            target[key] = value
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "in its header is 'other'"),
        ({"format": None}, "in its header is 'missing'"),
        ({"latents": None}, "no valid 'latents'"),
        ({"text": torch.zeros(3)}, "no valid 'text'; expected a tensor of 3 dimensions"),
        ({"sigmas": torch.tensor([1, 0])}, "no valid 'sigmas'"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.0])}, "5 latents, 3 sigmas and"),
        (
            {"latents": torch.full((5, 16, 8, 8), torch.nan)},
            "no valid 'latents'; expected a tensor of 4 dimensions with finite",
        ),
        ({"pooled": torch.full((1, 768), torch.inf)}, "no valid 'pooled'"),
        ({"text": torch.zeros(2, 24, 64)}, "2 prompts; expected as many latents as sigmas, and one"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.6, 0.1, 0.0])}, "sigmas .* expected at least two that fall"),
        ({"nudging": "much"}, "header of cat.safetensors is incomplete"),
        ({"prompt": None}, "header of cat.safetensors is incomplete"),
    ],
)
def test_damaged_files(trajectory, tmp_path, changes, message):
    path = tmp_path / "cat.safetensors"
    save_trajectory(trajectory, path)
    rewrite(path, **changes)
    with pytest.raises(SliderError, match=message):
        load_trajectory(path)


def test_truncated_and_missing_files(trajectory, tmp_path):
    path = tmp_path / "cat.safetensors"
    save_trajectory(trajectory, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SliderError, match="cannot be read as a trajectory"):
        load_trajectory(path)
    path.unlink()
    with pytest.raises(SliderError, match="no longer exists"):
        load_trajectory(path)


def load_flux(recipe, config):
    return comfy.sd.load_diffusion_model_state_dict(recipe.flux_weights(config), model_options={"dtype": torch.float32})


def test_other_models_are_rejected_and_other_dtypes_accepted(golden_model, recipe, manifest, trajectory):
    config = manifest["model"]
    for change, message in (({"seed": 99}, "a different FLUX.1 model"), ({"hidden": 128}, "another model")):
        with pytest.raises(SliderError, match=f"The trajectory was made with {message}"):
            edit_from_trajectory(load_flux(recipe, config | change), batched_text(), trajectory)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        rounded = {key: value.to(dtype) for key, value in recipe.flux_weights(config).items()}
        trajectory.check_model(comfy.sd.load_diffusion_model_state_dict(rounded, model_options={"dtype": dtype}))


@pytest.mark.usefixtures("unpatch_golden_model")
def test_loras_do_not_change_the_fingerprint(golden_model):
    """Not even a LoRA on the fingerprinted parameter, loaded or not."""
    patched, key = golden_model.clone(), "diffusion_model.img_in.bias"
    patched.add_patches({key: ("diff", (noise(256, seed=3),))})
    trajectory = invert_photo(patched)
    for model in (golden_model, patched, golden_model):
        trajectory.check_model(model)
        invert_photo(model, steps=1)
        trajectory.check_model(patched)


def test_errors(golden_model, trajectory):
    text, source, sigmas = source_text(), photo(golden_model), sigmas_of(golden_model)
    invalid = [
        (source.repeat(2, 1, 1, 1), sigmas, "The latent has 2 images"),
        (
            torch.zeros(LATENT),
            sigmas,
            "is empty, contains values that are not finite, .* expected an image with 16 channels",
        ),
        (source[:, :4], sigmas, r"latent of shape \(1, 4, 8, 8\) .* an image with 16 channels"),
        (source[:, :, None], sigmas, "expected an image with 16 channels"),
        (source / 0, sigmas, "values that are not finite"),
        (source, torch.tensor([14.6, 7.0, 0.0]), r"begin with 14\.6, 7, 0; expected .* flow matching"),
        (source, sigmas[:-1], "expected at least two that fall from at most 1 to 0"),
        (source, sigmas.flip(0), "fall from at most 1 to 0"),
        (source, sigmas[:0], "expected at least two"),
    ]
    for latent, sigma_values, message in invalid:
        with pytest.raises(SliderError, match=message):
            invert(golden_model, text, latent, sigma_values, PROMPT)
    with pytest.raises(SliderError, match="no pooled vector"):
        invert(golden_model, [[text[0][0], {}]], source, sigmas, PROMPT)
    with pytest.raises(SliderError, match=r"There is one prompt, .* choose 'remembered by the model'"):
        edit_from_trajectory(golden_model, source_text(), trajectory)
    [[cond, options]] = batched_text()
    with pytest.raises(SliderError, match=r"The source prompt differs from the prompt of the inversion \('a “photo”"):
        edit_from_trajectory(golden_model, [[cond.flip(0), options]], trajectory)
    with pytest.raises(SliderError, match=r"is \(20, 64\) here, but was \(24, 64\)"):
        edit_from_trajectory(golden_model, [[cond[:, :20], options]], trajectory)


def test_models_other_than_flow_matching_are_rejected(golden_model, trajectory):
    other = golden_model.clone()
    other.add_object_patch("model_sampling", comfy.model_sampling.EPS())
    with pytest.raises(SliderError, match="samples by EPS, which is not flow matching"):
        invert(other, source_text(), photo(golden_model), trajectory.sigmas, PROMPT)
    with pytest.raises(SliderError, match="not flow matching"):
        edit_from_trajectory(other, batched_text(), trajectory)


def test_model_is_unchanged(golden_model):
    x = noise(*LATENT, seed=4)
    before = velocity_of(golden_model, x, 0.5, source_text())
    trajectory = invert_photo(golden_model)
    edit_from_trajectory(inject_key_values(golden_model, [0]), batched_text(), trajectory)
    assert torch.equal(velocity_of(golden_model, x, 0.5, source_text()), before)
