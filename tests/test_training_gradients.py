"""Gradients through ComfyUI's frozen model: exact, with and without checkpointing."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.sd
import pytest
import torch

from slider_core.families.flux import Flux
from training.config import ObjectiveConfig
from training.frozen_model import FrozenModel, Text
from training.objectives import Batch, FlowMatching, PromptSuppression, TrainingSample
from training.trainable import TrainableLora, TrainableProjector

ROWS = 12
SIZE = 8


@pytest.fixture(autouse=True)
def in_training(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", True)


@pytest.fixture(scope="module")
def weights(recipe, manifest) -> dict[str, torch.Tensor]:
    return recipe.flux_weights(manifest["model"])


def model(weights, dtype: torch.dtype, gradient_checkpointing: bool) -> FrozenModel:
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options={"dtype": dtype})
    return FrozenModel(patcher, gradient_checkpointing)


def lora(frozen: FrozenModel, kind: str, dtype: torch.dtype = torch.float32) -> TrainableLora:
    """A LoRA without zero factors, as in the middle of training."""
    learning = TrainableLora(frozen, kind, rank=3, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return learning.to(dtype)


def sample(prompt: tuple[str, ...], suppressed: tuple[int, ...], teacher: tuple[str, ...] | None) -> TrainingSample:
    nothing = None
    return TrainingSample(nothing, nothing, prompt, teacher, suppressed, 0.4, False, 0.6, (0, 0, 0))


def batch(manifest, teacher: bool = True) -> Batch:
    """Two samples; the first has its second instruction suppressed, the other its only one."""
    generator = torch.Generator().manual_seed(3)
    width, pooled = manifest["model"]["context_in_dim"], manifest["model"]["vec_in_dim"]

    def text() -> Text:
        return Text(torch.randn(2, ROWS, width, generator=generator), torch.randn(2, pooled, generator=generator))

    latents = torch.randn(3, 2, 16, SIZE, SIZE, generator=generator)
    return Batch(
        samples=[sample(("a", "b"), (1,), ("a",)), sample(("c",), (0,), ())],
        source_latent=latents[0],
        target_latent=latents[1],
        noise=latents[2],
        sigma=torch.tensor([0.6, 0.25]),
        text=text(),
        teacher=text() if teacher else None,
        tokens=[((1, 2), (4, 5, 6)), ((2, 3),)],
    )


def settings(kind: str) -> ObjectiveConfig:
    return ObjectiveConfig(type=kind, guidance=3.5)


def gradients(frozen: FrozenModel, learning, objective, of: Batch) -> dict[str, torch.Tensor]:
    objective.accumulate_gradients(frozen, of, 0.5)
    return {name: parameter.grad.double() for name, parameter in learning.named_parameters()}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    return max((one[name] - other[name]).norm().item() / other[name].norm().item() for name in other)


@pytest.mark.parametrize("kind", ["STLoRA", "GSTLoRA"])
def test_equal_to_float64_without_checkpointing(weights, manifest, kind):
    of = batch(manifest)
    found = {}
    for dtype, checkpointing in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        frozen = model(weights, dtype, checkpointing)
        learning = lora(frozen, kind, dtype)
        found[dtype, checkpointing] = gradients(
            frozen, learning, PromptSuppression(settings("pps"), 0, learning, True), of
        )
    exact = found[torch.float64, False]
    assert apart(found[torch.float32, False], exact) < 1e-4
    assert apart(found[torch.float32, True], exact) < 1e-4


@pytest.mark.parametrize("storage", ["float8_e4m3fn", "quantized", "partly loaded"])
def test_the_weights_storage_does_not_matter(weights, manifest, storage):
    """As with the same values in float32: 8-bit floats, ComfyUI's quantized layers, offloaded weights."""
    of = batch(manifest)
    frozen = model(weights, torch.float32, True)
    if storage == "float8_e4m3fn":
        stored = model(weights, torch.float8_e4m3fn, True)
        assert stored.network.double_blocks[0].txt_mlp[0].weight.dtype == torch.float8_e4m3fn
        frozen = model(
            {name: value.to(torch.float8_e4m3fn).float() for name, value in weights.items()}, torch.float32, True
        )
    elif storage == "quantized":
        written, meant = quantized(weights)
        stored, frozen = model(written, torch.float32, True), model(meant, torch.float32, True)
        assert type(stored.network.double_blocks[0].txt_mlp[0].weight).__name__ == "QuantizedTensor"
    else:
        stored = model(weights, torch.float32, True)
        stored.patcher.load(lowvram_model_memory=10_000)
        assert sum(getattr(module, "comfy_cast_weights", False) for module in stored.network.modules()) > 10
    found = {}
    for name, of_model in (("stored", stored), ("plain", frozen)):
        learning = lora(of_model, "GSTLoRA")
        found[name] = gradients(of_model, learning, PromptSuppression(settings("pps"), 0, learning, True), of)
    assert apart(found["stored"], found["plain"]) < 0.02


def quantized(weights):
    """The weights with the linears of double blocks as ComfyUI's scaled 8-bit floats, and dequantized."""
    written, meant = dict(weights), dict(weights)
    for name, value in weights.items():
        if name.startswith("double_blocks.") and name.endswith(".weight") and value.ndim == 2:
            scale = value.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            stored = (value / scale).to(torch.float8_e4m3fn)
            layer = name.removesuffix(".weight")
            written[name], written[f"{layer}.weight_scale"] = stored, scale
            kind = json.dumps({"format": "float8_e4m3fn"}).encode()
            written[f"{layer}.comfy_quant"] = torch.tensor(list(kind), dtype=torch.uint8)
            meant[name] = stored.float() * scale
    return written, meant


def test_equal_to_finite_differences(weights, manifest):
    of = batch(manifest)
    frozen = model(weights, torch.float64, True)
    learning = lora(frozen, "STLoRA", torch.float64)
    objective = PromptSuppression(settings("pps"), 0, learning, True)
    exact = gradients(frozen, learning, objective, of)
    generator = torch.Generator().manual_seed(4)
    direction = {name: torch.randn(value.shape, generator=generator).double() for name, value in exact.items()}
    expected = sum((exact[name] * direction[name]).sum() for name in exact).item()

    def loss(step: float) -> float:
        with torch.no_grad():
            for name, parameter in learning.named_parameters():
                parameter.add_(direction[name], alpha=step)
        total = objective.accumulate_gradients(frozen, of, 0.5).sum().item() * 0.5
        with torch.no_grad():
            for name, parameter in learning.named_parameters():
                parameter.add_(direction[name], alpha=-step)
        return total

    # The loss is a float32: a smaller step would measure its rounding, a larger one the curvature.
    assert (loss(3e-3) - loss(-3e-3)) / 6e-3 == pytest.approx(expected, rel=5e-3)


def test_of_the_projector_and_its_lora(weights, manifest):
    of = batch(manifest, teacher=False)
    found = {}
    for checkpointing in (False, True):
        frozen = model(weights, torch.float32, checkpointing)
        learning = torch.nn.ModuleList([lora(frozen, "GSTLoRA"), TrainableProjector(frozen, seed=1)])
        objective = FlowMatching(settings("flow"), 0, *learning)
        found[checkpointing] = gradients(frozen, learning, objective, of)
    assert apart(found[True], found[False]) < 1e-4
    assert all(value.norm() > 0 for value in found[True].values())


def test_in_half_precision(weights, manifest):
    """In float16 ComfyUI reads the outputs of blocks, so no output may be skipped in recomputation."""
    of = batch(manifest)
    found = {}
    for dtype in (torch.float16, torch.float32):
        frozen = model(weights, dtype, True)
        frozen.patcher.model.manual_cast_dtype = None  # on the CPU ComfyUI would compute in float32
        assert frozen.dtype == dtype
        learning = lora(frozen, "GSTLoRA")
        found[dtype] = gradients(frozen, learning, PromptSuppression(settings("pps"), 0, learning, True), of)
    assert apart(found[torch.float16], found[torch.float32]) < 0.05


def test_where_the_strength_is_dropped_there_is_no_projector(weights, manifest):
    of = batch(manifest, teacher=False)
    frozen = model(weights, torch.float32, False)
    learning = torch.nn.ModuleList([lora(frozen, "GSTLoRA"), TrainableProjector(frozen, seed=1)])
    objective = FlowMatching(settings("flow"), 0, *learning)
    of = of._replace(samples=[of.samples[0], of.samples[1]._replace(strength_dropped=True)])

    def said(changes):
        with torch.no_grad(), frozen.patched(changes):
            return objective.velocity(frozen, of, of.text)

    both, without = said(objective.forward_wrappers(of)), said(learning[0].forward_wrappers(torch.ones(())))
    assert not torch.allclose(both[0], without[0], atol=1e-4)
    assert torch.allclose(both[1], without[1], atol=1e-5)


def test_without_copies_of_modified_inputs_gradients_are_wrong(weights, manifest, monkeypatch):
    """Checkpointing hides autograd's error, so only a test of the gradients can show that the copies are needed."""
    of = batch(manifest)
    frozen = model(weights, torch.float32, True)
    learning = lora(frozen, "STLoRA")
    objective = PromptSuppression(settings("pps"), 0, learning, True)
    exact = gradients(frozen, learning, objective, of)
    learning.zero_grad()
    monkeypatch.setattr(Flux, "inplace_modified_inputs", lambda *_: [])
    assert not apart(gradients(frozen, learning, objective, of), exact) < 0.01  # not finite, or another


def test_the_backward_pass_must_run_in_the_context(weights, manifest):
    """Outside the context, checkpointed blocks are recomputed without the adapter."""
    of = batch(manifest)
    frozen = model(weights, torch.float32, True)
    learning = lora(frozen, "STLoRA")
    objective = PromptSuppression(settings("pps"), 0, learning, True)
    wanted = objective.target_velocity(frozen, of)
    with frozen.patched(objective.forward_wrappers(of)):
        losses = objective.losses(objective.velocity(frozen, of, of.text), wanted)
    with pytest.raises((RuntimeError, torch.utils.checkpoint.CheckpointError)):
        losses.sum().backward()


def test_only_tokens_of_suppressed_instructions_change(weights, manifest):
    of = batch(manifest)
    frozen = model(weights, torch.float32, True)
    objective = PromptSuppression(settings("pps"), 0, lora(frozen, "STLoRA"), True)
    place = "double_blocks.0.txt_mlp.0"
    linear = frozen.network.get_submodule(place)
    x = torch.randn(2, ROWS, linear.in_features)
    with torch.no_grad():
        moved = objective.forward_wrappers(of)[place](linear.forward)(x) - linear(x)
    assert [row for row in range(ROWS) if moved[0, row].any()] == [4, 5, 6]
    assert [row for row in range(ROWS) if moved[1, row].any()] == [2, 3]


def test_the_model_is_restored(weights, manifest):
    of = batch(manifest)
    frozen = model(weights, torch.float32, True)
    learning = lora(frozen, "STLoRA")
    with torch.no_grad():
        before = frozen.velocity(of.noised_latent, of.sigma, of.text, 3.5, [of.source_latent])
    PromptSuppression(settings("pps"), 0, learning, True).accumulate_gradients(frozen, of, 1.0)
    with torch.no_grad():
        after = frozen.velocity(of.noised_latent, of.sigma, of.text, 3.5, [of.source_latent])
    assert torch.equal(before, after)
    assert not any("forward" in vars(module) for module in frozen.network.modules())
    assert all(parameter.grad is None for parameter in frozen.network.parameters())
