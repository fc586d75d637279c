"""Training-free methods: what each computes, its effect on other conds and batches, refusals, and graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from comfy.ldm.flux.math import attention
from support.graphs import Graph, Link
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import differ, latents, near

from slider_core import keys
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.errors import SliderError
from slider_core.patching.forward_patches import ForwardContext, patches_of
from slider_core.training_free.attention_reweighting import apply_attention_reweighting
from slider_core.training_free.text_modulation import apply_text_modulation
from slider_core.training_free.token_interpolation import apply_token_interpolation

SIGMA, NUM_TOKENS, NUM_PADDING = 0.7, 24, 6
SPANS = [Span("first", (2, 3, 4)), Span("second", (4, 5, 6, 7))]
METHODS = {
    "text modulation": apply_text_modulation,
    "attention to text": apply_attention_reweighting,
    "token interpolation": apply_token_interpolation,
}
PROMPT = "make the cat older\nmake the wall golden"


X = noise(1, 16, 8, 8, seed=9)
CONTEXT_ARGS = (torch.device("cpu"), torch.float32, None, X.shape, torch.tensor(SIGMA), float, None, None)


def text(*strengths: object, seed: int = 1, padding: int = NUM_PADDING) -> list:
    cond = [[noise(1, NUM_TOKENS, 64, seed=seed), {"pooled_output": noise(1, 768, seed=seed + 1), "guidance": 3.5}]]
    spanned = attach_spans(cond, NUM_TOKENS, SPANS[: len(strengths)], padding)
    return set_strengths(spanned, {f"strength_{k}": s for k, s in enumerate(strengths, 1)}) if strengths else cond


@pytest.fixture(params=METHODS)
def apply(request) -> Callable:
    return METHODS[request.param]


def test_strength_one_and_other_conds_equal_the_bare_model(golden_model, apply):
    model = apply(golden_model)
    bare = velocity_of(golden_model, X, SIGMA, text(), text(seed=5))
    assert torch.equal(bare, velocity_of(model, X, SIGMA, text(1.0, 1.0), text(seed=5)))
    slid = velocity_of(model, X, SIGMA, text(0.3, 1.0), text(seed=5))
    assert differ(slid[:1], bare[:1])
    assert near(slid[1:], velocity_of(golden_model, X, SIGMA, text(seed=5)))
    assert differ(slid[1:], velocity_of(model, X, SIGMA, text(0.3, 1.0, seed=5)))
    assert torch.equal(bare, velocity_of(golden_model, X, SIGMA, text(), text(seed=5)))


def test_strengths_per_image_equal_single_runs(golden_model, apply):
    model, values = apply(golden_model), (0.0, 0.5, 1.6)
    together = velocity_of(model, X.repeat(3, 1, 1, 1), SIGMA, text(values, 0.7))
    for k, value in enumerate(values):
        assert near(together[k : k + 1], velocity_of(model, X, SIGMA, text(value, 0.7)))


def test_tokens_at_strength_zero_pass_a_block_unchanged(golden_model):
    """At strength 0 the gates of the text modulation are 0: a block changes all text tokens except the span's."""
    captured = []
    block = golden_model.model.diffusion_model.double_blocks[0]
    before = block.register_forward_pre_hook(
        lambda module, args, kwargs: captured.append(kwargs["txt"].clone()), with_kwargs=True
    )
    after = block.register_forward_hook(lambda module, args, out: captured.append(out[1].clone()))
    try:
        velocity_of(apply_text_modulation(golden_model), X, SIGMA, text(0.0))
    finally:
        before.remove()
        after.remove()
    unchanged = (captured[0] == captured[1]).all(dim=-1)[0].nonzero().flatten().tolist()
    assert unchanged == list(SPANS[0].tokens)


def test_modulation_is_scaled_by_the_strength(golden_model):
    [patch] = patches_of(apply_text_modulation(golden_model))
    scale = torch.zeros(1, NUM_TOKENS)
    scale[0, 2], scale[0, 3] = 1 - 0.25, 1 - 1.5
    context = ForwardContext({keys.suppression("default"): scale}, 1, 1, NUM_TOKENS, *CONTEXT_ARGS)
    assert set(patch.paths) == {f"double_blocks.{k}.txt_mod" for k in range(len(patch.paths))}
    module = golden_model.model.diffusion_model.get_submodule(patch.paths[-1])
    vec = noise(1, 256)
    plain = module(vec)
    scaled = patch.forward_wrappers(context)[patch.paths[-1]](module.forward)(vec)
    for a, b in zip(plain, scaled):
        for name in ("shift", "scale", "gate"):
            value, token_values = getattr(a, name)[0, 0], getattr(b, name)[0]
            assert torch.allclose(token_values[2], 0.25 * value)
            assert torch.allclose(token_values[3], 1.5 * value)
            assert torch.equal(token_values[5], value)


def test_attention_weights_are_scaled_and_normalized(golden_model):
    """Equals the formula: softmax, times the strength where image tokens attend to a span, normalized again."""
    [patch] = patches_of(apply_attention_reweighting(golden_model))
    strengths = torch.ones(2, 3)
    strengths[0, 1], strengths[1, 2] = 0.3, 0.0
    context = ForwardContext({keys.suppression("default"): 1 - strengths}, 2, 1, 3, *CONTEXT_ARGS)
    q, k, v = (noise(2, 4, 9, 16, seed=seed) for seed in range(3))
    [patch] = patch.attention_patches(context)
    reweighted = attention(q, k, v, pe=None, mask=patch(q, k, v)["attn_mask"])
    weights = (q @ k.transpose(-1, -2) / 4).softmax(dim=-1)
    factor = torch.ones(2, 1, 9, 9)
    factor[:, 0, 3:, :3] = strengths[:, None]
    weights = weights * factor
    expected = (weights / weights.sum(dim=-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(reweighted, expected, atol=1e-5)
    for shape in ((9, 9), (2, 9, 9), (1, 9, 9), (2, 1, 9, 9)):
        other = noise(*shape, seed=7)
        masked = patch(q, k, v, attn_mask=other)["attn_mask"]
        assert masked.shape == (2, 1, 9, 9)
        value = other[..., 5, 1].flatten().expand(2)[1]
        assert masked[1, 0, 5, 1] == pytest.approx(float(value))
    allowed = torch.ones(9, 9, dtype=torch.bool)
    allowed[:, 8] = False
    for other in (allowed, torch.zeros(9, 9).masked_fill(~allowed, -torch.inf)):
        masked = patch(q, k, v, attn_mask=other)["attn_mask"]
        assert masked[..., 8].isinf().all()
        assert masked[0, 0, 5, 1] == pytest.approx(np.log(0.3))


@contextlib.contextmanager
def interpolating_hooks(model, strengths: Mapping[int, float]) -> Iterator[None]:
    """Hooks that mix, in every block, the attention input of text tokens (index -> strength) with a padding token's."""

    def interpolate(y):
        y = y.clone()
        for token, s in strengths.items():
            y[:, token] = s * y[:, token] + (1 - s) * y[:, NUM_TOKENS - 1]
        return y

    def double_block_hook(_, args):
        return (interpolate(args[0]),)

    def single_block_hook(linear, args, out):
        num_qkv_features = 3 * linear.in_features
        interpolated = torch.nn.functional.linear(interpolate(args[0]), linear.weight, linear.bias)
        return torch.cat([interpolated[..., :num_qkv_features], out[..., num_qkv_features:]], dim=-1)

    flux = model.model.diffusion_model
    hooks = [block.txt_attn.qkv.register_forward_pre_hook(double_block_hook) for block in flux.double_blocks]
    hooks += [block.linear1.register_forward_hook(single_block_hook) for block in flux.single_blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_tokens_are_interpolated_with_padding_in_every_block(golden_model):
    model = apply_token_interpolation(golden_model)
    assert len(golden_model.model.diffusion_model.single_blocks) > 0
    for first, second in ((0.0, 1.0), (0.3, 1.0), (0.3, 1.6), (-0.5, 0.2)):
        strengths = dict.fromkeys(SPANS[0].tokens, first) | dict.fromkeys(SPANS[1].tokens, second)
        strengths[4] = 1 - (1 - first) * (1 - second)  # in both spans
        with interpolating_hooks(golden_model, strengths):
            expected = velocity_of(golden_model, X, SIGMA, text())
        assert near(velocity_of(model, X, SIGMA, text(first, second)), expected)


def test_padding_token_of_the_encoded_prompt_is_used(golden_model):
    """Not a token of a conditioning appended by ConditioningConcat."""
    [[cond, options]] = text(0.0)
    longer = [[torch.cat([cond, noise(1, 5, 64, seed=8)], 1), options]]
    with interpolating_hooks(golden_model, dict.fromkeys(SPANS[0].tokens, 0.0)):
        expected = velocity_of(golden_model, X, SIGMA, [[longer[0][0], {**options, "model_conds": {}}]])
    assert near(velocity_of(apply_token_interpolation(golden_model), X, SIGMA, longer), expected)


def test_two_prompts_in_one_batch_keep_their_own_strengths(golden_model):
    model = apply_token_interpolation(golden_model)
    prompts = text(0.2), text(1.4, seed=5)
    separate = torch.cat([velocity_of(model, X, SIGMA, prompt) for prompt in prompts])
    assert near(velocity_of(model, X, SIGMA, *prompts), separate)


def test_a_prompt_without_padding_is_refused(golden_model):
    model = apply_token_interpolation(golden_model)
    with pytest.raises(SliderError, match=r"no padding.*pad_to_512"):
        velocity_of(model, X, SIGMA, text(0.2, padding=0))
    assert velocity_of(model, X, SIGMA, text(1.0, padding=0)).isfinite().all()
    assert differ(velocity_of(model, X, SIGMA, text(0.2, padding=1)), velocity_of(golden_model, X, SIGMA, text()))


def test_interpolation_with_torch_compile(golden_model):
    model = apply_token_interpolation(golden_model)
    assert near(velocity_of(compiled(model), X, SIGMA, text(0.2)), velocity_of(model, X, SIGMA, text(0.2)))


def test_attention_reweighting_refuses_negative_strengths_and_compiled_models(golden_model):
    model = apply_attention_reweighting(golden_model)
    with pytest.raises(SliderError, match="below 0"):
        velocity_of(model, X, SIGMA, text(-0.2))
    model = compiled(model)
    with pytest.raises(SliderError, match=r"compiled.*Bypass the compile node"):
        velocity_of(model, X, SIGMA, text(0.2))
    assert near(velocity_of(model, X, SIGMA, text()), velocity_of(golden_model, X, SIGMA, text()))


def test_graphs(server):
    def build(method: str, strength: float) -> Callable[[Graph], Link]:
        def graph(g: Graph) -> Link:
            model = g.add("EditSlidersApplyTrainingFree", model=g.model(), method=method)
            return g.sample(model, g.edited(g.strengths(g.instructions(PROMPT), strength)))

        return graph

    graphs = [build(method, strength) for method in METHODS for strength in (0.2, 1.0, 1.5)]
    *outs, bare = latents(server, *graphs, lambda g: g.sample(g.model(), g.edited(g.instructions(PROMPT))))
    for weak, one, strong in (outs[:3], outs[3:6], outs[6:]):
        assert np.array_equal(one, bare)
        assert differ(weak, bare)
        assert differ(strong, bare)
        assert differ(weak, strong)
    assert differ(outs[0], outs[3])
    assert differ(outs[0], outs[6])
    assert differ(outs[3], outs[6])
