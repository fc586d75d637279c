"""Slider adapters on the model: combinations, batches, dtypes, torch.compile, and a model that stays unchanged."""

from __future__ import annotations

import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_management import load_models_gpu
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import differ

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.errors import SliderError

STLORA = GOLDEN / "examples" / "selective_lora.pt"
GSTLORA = GOLDEN / "examples" / "gstlora_pytorch_lora_weights.safetensors"
OTHER = GOLDEN / "examples" / "kk_pytorch_lora_weights.safetensors"
SPANS = [Span("first", (2, 3, 4)), Span("second", (4, 5, 6, 7))]
SIGMA = 0.7


@pytest.fixture(scope="module")
def st():
    return read_adapter(STLORA)


@pytest.fixture(scope="module")
def gst():
    return read_adapter(GSTLORA)


def text(*strengths: object, num_tokens: int = 24, seed: int = 1, **options) -> list:
    cond = [
        [
            noise(1, num_tokens, 64, seed=seed),
            {"pooled_output": noise(1, 768, seed=seed + 1), "guidance": 3.5, **options},
        ]
    ]
    spanned = attach_spans(cond, num_tokens, SPANS[: len(strengths)])
    return set_strengths(spanned, {f"strength_{k}": s for k, s in enumerate(strengths, 1)}) if strengths else cond


X = noise(1, 16, 8, 8, seed=9)


def near(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> bool:
    return torch.allclose(a, b, atol=atol, rtol=1e-4)


def test_strength_one_is_the_bare_model_bit_for_bit(golden_model, st, gst):
    bare = velocity_of(golden_model, X, SIGMA, text())
    both = apply_gstlora(apply_stlora(golden_model, st), gst, 1.0)
    assert torch.equal(bare, velocity_of(both, X, SIGMA, text(1.0, 1.0)))
    assert "model_conds" not in text()[0][1]
    assert text(1.0, 1.0)[0][1]["model_conds"] == {}
    assert differ(bare, velocity_of(both, X, SIGMA, text(1.0, 0.0)))
    assert differ(bare, velocity_of(apply_gstlora(golden_model, gst, 0.0), X, SIGMA, text()))


def test_model_is_unchanged_after_calls(golden_model, st, gst):
    bare = velocity_of(golden_model, X, SIGMA, text())
    patched = apply_gstlora(apply_stlora(golden_model, st), gst, 0.3)
    velocity_of(patched, X, SIGMA, text(0.0))
    assert not any("forward" in vars(m) for m in golden_model.model.modules())
    assert torch.equal(bare, velocity_of(golden_model, X, SIGMA, text()))
    first, second = (apply_gstlora(golden_model, gst, s) for s in (0.0, 0.5))
    a = velocity_of(first, X, SIGMA, text())
    velocity_of(second, X, SIGMA, text())
    assert torch.equal(a, velocity_of(first, X, SIGMA, text()))


def test_model_is_unchanged_after_a_failing_block(golden_model, st, gst):
    patched = apply_gstlora(apply_stlora(golden_model, st), gst, 0.3)
    broken = patched.clone()

    def fail(args, extra):
        raise InterruptedError

    broken.set_model_patch_replace(fail, "dit", "double_block", 1)
    with pytest.raises(InterruptedError):
        velocity_of(broken, X, SIGMA, text(0.0))
    assert not any("forward" in vars(m) for m in golden_model.model.modules())


def test_foreign_forward_is_kept(golden_model, st):
    linear = golden_model.model.diffusion_model.double_blocks[0].txt_attn.qkv
    calls = []
    original_forward = linear.forward
    linear.forward = lambda x: (calls.append(1), original_forward(x))[1]
    foreign_forward = linear.forward
    try:
        velocity_of(apply_stlora(golden_model, st), X, SIGMA, text(0.0))
        assert linear.forward is foreign_forward
        assert calls
    finally:
        del linear.forward


def test_lora_branch_equals_merging(golden_model, gst):
    merged = merge(golden_model, GSTLORA, 0.7)
    with loaded(merged):
        expected = velocity_of(merged, X, SIGMA, text())
    assert near(expected, velocity_of(apply_gstlora(golden_model, gst, 0.3), X, SIGMA, text()))


def merge(model, path, strength: float):
    """The model with a LoRA as the stock loader applies it, as weight patches."""
    merged, _ = comfy.sd.load_lora_for_models(model, None, load_file(path), strength, 0)
    return merged


class loaded:
    """Context manager in which ComfyUI has loaded a model and its weight patches."""

    def __init__(self, model, **options):
        self.model, self.options = model, options

    def __enter__(self):
        comfy.model_management.unload_all_models()
        self.model.patch_model(self.model.load_device, **self.options)

    def __exit__(self, *exc):
        self.model.unpatch_model(self.model.offload_device)


@pytest.mark.parametrize("order", ["lora first", "lora last"])
def test_with_merged_lora(golden_model, st, gst, order):
    def sliders(model):
        return apply_stlora(apply_gstlora(model, gst, 0.4), st)

    def lora(model):
        return merge(model, OTHER, 0.8)

    both = sliders(lora(golden_model)) if order == "lora first" else lora(sliders(golden_model))
    with loaded(both):
        result = velocity_of(both, X, SIGMA, text(0.2))
        only_lora = velocity_of(lora(golden_model), X, SIGMA, text())
    reference = apply_gstlora(apply_gstlora(apply_stlora(golden_model, st), gst, 0.4), read_adapter(OTHER), 0.2)
    assert near(result, velocity_of(reference, X, SIGMA, text(0.2)))
    assert differ(result, only_lora)


def test_adapters_in_any_order(golden_model, st, gst):
    other = read_adapter(OTHER)
    steps = [
        lambda m: apply_stlora(m, st),
        lambda m: apply_gstlora(m, gst, 0.5),
        lambda m: apply_gstlora(m, other, 1.4),
    ]
    outs = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        model = golden_model
        for k in order:
            model = steps[k](model)
        outs.append(velocity_of(model, X, SIGMA, text(0.0, 1.3)))
    assert near(outs[0], outs[1])
    assert near(outs[0], outs[2])
    twice = apply_gstlora(apply_gstlora(golden_model, gst, 0.7), gst, 0.8)
    assert near(
        velocity_of(twice, X, SIGMA, text()), velocity_of(apply_gstlora(golden_model, gst, 0.5), X, SIGMA, text())
    )


def test_copy_for_another_gpu_has_its_own_lora_branches(recipe, manifest, tmp_path, st, gst):
    save_file(recipe.flux_weights(manifest["model"]), tmp_path / "model.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"), {"dtype": torch.float32})
    patched = apply_gstlora(apply_stlora(model, st), gst, 0.5)
    copied = patched.deepclone_multigpu(new_load_device=torch.device("cpu"))
    expected = velocity_of(patched, X, SIGMA, text(0.2))
    assert near(expected, velocity_of(copied, X, SIGMA, text(0.2)))
    for branches in copied.get_additional_models():
        for parameter in branches.model.parameters():
            parameter.data = torch.full_like(parameter, torch.nan)
    assert velocity_of(copied, X, SIGMA, text(0.2)).isnan().any()
    assert torch.equal(expected, velocity_of(patched, X, SIGMA, text(0.2)))


def test_changed_strength_causes_no_memory_leak_warning(golden_model, gst, caplog):
    """ComfyUI replaces a deleted clone by a patcher that still exists."""
    first = apply_gstlora(golden_model, gst, 0.2)
    load_models_gpu([first, *first.get_nested_additional_models()])
    del first
    caplog.clear()
    with caplog.at_level("INFO"):
        second = apply_gstlora(golden_model, gst, 0.8)
        load_models_gpu([second, *second.get_nested_additional_models()])
    assert not [r.message for r in caplog.records if "memory leak" in r.message]


def test_channels(golden_model, st):
    model = apply_stlora(golden_model, st, "faces")
    bare = velocity_of(golden_model, X, SIGMA, text())
    assert torch.equal(bare, velocity_of(model, X, SIGMA, text(0.0)))
    cond = set_strengths(attach_spans(text(), 24, SPANS[:1]), {"strength_1": 0.0}, "faces")
    assert torch.equal(
        velocity_of(model, X, SIGMA, cond), velocity_of(apply_stlora(golden_model, st), X, SIGMA, text(0.0))
    )


def test_strengths_act_on_their_own_cond(golden_model, st):
    model = apply_stlora(golden_model, st)
    positive, negative = text(0.0, 0.5), text(seed=5)
    together = velocity_of(model, X, SIGMA, positive, negative)
    assert near(together[:1], velocity_of(model, X, SIGMA, positive))
    assert near(together[1:], velocity_of(golden_model, X, SIGMA, negative))
    both = velocity_of(model, X, SIGMA, positive, text(1.2, 0.3, seed=5))
    assert near(both[:1], together[:1])
    assert differ(both[1:], together[1:])
    assert near(both[1:], velocity_of(model, X, SIGMA, text(1.2, 0.3, seed=5)))
    assert near(velocity_of(model, X, SIGMA, positive, text(0.3, num_tokens=40, seed=5))[:1], together[:1])


@pytest.mark.parametrize("references", [0, 1])
def test_batch_of_strengths_equals_single_runs(golden_model, st, gst, references):
    options = {"reference_latents": [noise(1, 16, 4, 4)] * references} if references else {}
    batch = X.repeat(3, 1, 1, 1)
    model = apply_stlora(golden_model, st)
    values = (0.0, 0.5, 1.5)
    swept = velocity_of(model, batch, SIGMA, text(values, 0.7, **options), text(0.4, **options))
    for k, value in enumerate(values):
        single = velocity_of(model, X, SIGMA, text(value, 0.7, **options))
        assert near(swept[k : k + 1], single)
        assert near(swept[3 + k : 4 + k], velocity_of(model, X, SIGMA, text(0.4, **options)))
    swept = velocity_of(
        apply_gstlora(golden_model, gst, values), batch, SIGMA, text(**options), text(seed=3, **options)
    )
    for k, value in enumerate(values):
        one = apply_gstlora(golden_model, gst, value)
        assert near(swept[k : k + 1], velocity_of(one, X, SIGMA, text(**options)))
        assert near(swept[3 + k : 4 + k], velocity_of(one, X, SIGMA, text(seed=3, **options)))


def test_number_of_strengths_must_match_the_batch(golden_model, st, gst):
    with pytest.raises(SliderError, match="3 strengths for a batch of 2"):
        velocity_of(apply_stlora(golden_model, st), X.repeat(2, 1, 1, 1), SIGMA, text((0.0, 0.5, 1.0)))
    with pytest.raises(SliderError, match="3 strengths for a batch of 2"):
        velocity_of(apply_gstlora(golden_model, gst, (0.0, 0.5, 1.0)), X.repeat(2, 1, 1, 1), SIGMA, text())


def test_concatenated_and_truncated_text(golden_model, st):
    model = apply_stlora(golden_model, st)
    [[cond, options]] = text(0.0)
    longer = [[torch.cat([cond, noise(1, 8, 64)], 1), options]]
    assert differ(velocity_of(model, X, SIGMA, longer), velocity_of(golden_model, X, SIGMA, longer))
    with pytest.raises(SliderError, match="24 tokens, but the model got 16"):
        velocity_of(model, X, SIGMA, [[cond[:, :16], options]])


def test_only_the_tokens_of_the_span_change(golden_model, st):
    """The queries of the first block's text stream change at the tokens of the span only."""
    queries = []
    linear = golden_model.model.diffusion_model.double_blocks[0].txt_attn.norm.query_norm
    handle = linear.register_forward_pre_hook(lambda module, args: queries.append(args[0].clone()))
    try:
        velocity_of(golden_model, X, SIGMA, text())
        velocity_of(apply_stlora(golden_model, st), X, SIGMA, text(0.0))
    finally:
        handle.remove()
    changed = (queries[0] != queries[1]).any(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert changed == list(SPANS[0].tokens)


@pytest.mark.parametrize("when", ["compiled first", "compiled last"])
def test_torch_compile(golden_model, st, gst, when):
    torch._dynamo.reset()

    def sliders(model, strength):
        return apply_gstlora(apply_stlora(model, st), gst, strength)

    base = compiled(golden_model)
    for strength in (0.3, 0.6):
        model = sliders(base, strength) if when == "compiled first" else compiled(sliders(golden_model, strength))
        expected = velocity_of(sliders(golden_model, strength), X, SIGMA, text(strength, 0.5))
        assert near(velocity_of(model, X, SIGMA, text(strength, 0.5)), expected)
        bare = velocity_of(golden_model, X, SIGMA, text())
        assert near(velocity_of(base, X, SIGMA, text()), bare)


def test_changed_strength_does_not_recompile(golden_model, st, gst):
    torch._dynamo.reset()
    base = compiled(golden_model)
    counts = []
    for strength in (0.3, 0.6, -0.2):
        model = apply_gstlora(apply_stlora(base, st), gst, strength)
        velocity_of(model, X, SIGMA, text(strength, 0.5))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_stored_dtypes(recipe, manifest, st, gst, dtype):
    weights = recipe.flux_weights(manifest["model"])
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    stored = model.model.diffusion_model.double_blocks[0].txt_attn.qkv.weight
    assert stored.dtype == dtype
    same_values = {k: v.to(dtype).float() for k, v in recipe.flux_weights(manifest["model"]).items()}
    full = comfy.sd.load_diffusion_model_state_dict(same_values, model_options={"dtype": torch.float32})
    result = velocity_of(apply_gstlora(apply_stlora(model, st), gst, 0.4), X, SIGMA, text(0.0))
    expected = velocity_of(apply_gstlora(apply_stlora(full, st), gst, 0.4), X, SIGMA, text(0.0))
    bare = velocity_of(full, X, SIGMA, text())
    assert (result - expected).abs().mean() < 0.1 * (expected - bare).abs().mean()
    assert stored.dtype == dtype


def test_partially_loaded_model(golden_model, st, gst):
    expected = velocity_of(apply_gstlora(apply_stlora(golden_model, st), gst, 0.4), X, SIGMA, text(0.0))
    model = apply_gstlora(apply_stlora(golden_model.clone(), st), gst, 0.4)
    with loaded(model, lowvram_model_memory=10_000):
        casting_modules = [m for m in model.model.modules() if getattr(m, "comfy_cast_weights", False)]
        assert len(casting_modules) > 10
        assert near(velocity_of(model, X, SIGMA, text(0.0)), expected)


def test_opaque_linears(golden_model, st, gst):
    """Adapters work on linears without accessible weights, as GGUF's: they use only input and output."""

    class Opaque(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.wrapped = [linear]

        def forward(self, x):
            return self.wrapped[0](x)

    model = golden_model.clone()
    block = model.model.diffusion_model.double_blocks[0]
    linear = block.txt_attn.qkv
    expected = velocity_of(apply_gstlora(apply_stlora(model, st), gst, 0.4), X, SIGMA, text(0.0))
    block.txt_attn.qkv = Opaque(linear)
    try:
        result = velocity_of(apply_gstlora(apply_stlora(model, st), gst, 0.4), X, SIGMA, text(0.0))
    finally:
        block.txt_attn.qkv = linear
    assert near(result, expected)
