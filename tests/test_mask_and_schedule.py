"""Mask and schedule of sliders: single model calls, sampling runs, and graphs on a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import comfy.sample
import comfy.samplers
import numpy as np
import pytest
import torch
from conftest import GOLDEN
from node_helpers import conditioning_set_values
from support.graphs import Graph, Link
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import differ, latents, near

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.adapters.strength_projector import apply_projector, read_projector, set_projector_strength
from slider_core.conditioning.mask_and_schedule import apply_mask_and_schedule
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.errors import SliderError
from slider_core.patching.forward_patches import in_schedule_range
from slider_core.training_free.prompt_difference import PromptDifferences
from slider_core.training_free.text_modulation import apply_text_modulation

EXAMPLES = GOLDEN / "examples"
SIGMA, TEXT_TOKENS = 0.7, 24
SPANS = [Span("first", (2, 3, 4)), Span("second", (4, 5, 6, 7))]
X = noise(1, 16, 8, 8, seed=9)
LEFT = torch.zeros(1, 8, 8)
LEFT[..., :4] = 1
OUTSIDE = 0.2


@pytest.fixture(scope="module")
def st():
    return read_adapter(EXAMPLES / "selective_lora.pt")


@pytest.fixture(scope="module")
def gst():
    return read_adapter(EXAMPLES / "gstlora_pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def bundle(recipe, manifest, tmp_path_factory):
    file = tmp_path_factory.mktemp("projector") / "slider_projector.pth"
    torch.save(recipe.projector_weights(manifest["model"], manifest["adapters"]["projector"]), file)
    return read_projector(file, EXAMPLES / "kk_pytorch_lora_weights.safetensors")


def plain(seed: int = 1, **options) -> list:
    pooled = noise(1, 768, seed=seed + 1)
    return [[noise(1, TEXT_TOKENS, 64, seed=seed), {"pooled_output": pooled, "guidance": 3.5, **options}]]


def at(*strengths: object, channel: str = "default", **options) -> list:
    spanned = attach_spans(plain(**options), TEXT_TOKENS, SPANS[: len(strengths)])
    return set_strengths(spanned, {f"strength_{k}": s for k, s in enumerate(strengths, 1)}, channel)


Method = tuple[Callable, Callable]
"""Two functions: model -> model with sliders; strength (one, or one per image) -> conditioning."""


@pytest.fixture(params=["STLoRA", "two STLoRAs", "text modulation", "projector", "all combined"])
def method(request, golden_model, st, gst, bundle) -> Method:
    def channels(strength: object, **options) -> list:
        spanned = at(strength, strength, **options)
        return set_strengths(spanned, {"strength_1": strength, "strength_2": strength}, "other")

    apply, cond = {
        "STLoRA": (lambda m: apply_stlora(m, st), lambda s, **o: at(s, s, **o)),
        "two STLoRAs": (lambda m: apply_stlora(apply_stlora(m, st), st, "other"), channels),
        "text modulation": (apply_text_modulation, lambda s, **o: at(s, s, **o)),
        "projector": (
            lambda m: apply_projector(m, bundle),
            lambda s, **o: set_projector_strength(plain(**o), bundle, s),
        ),
        "all combined": (
            lambda m: apply_projector(apply_text_modulation(apply_stlora(m, st), "other"), bundle),
            lambda s, **o: set_projector_strength(channels(s, **o), bundle, s),
        ),
    }[request.param]
    return apply(golden_model), cond


def test_full_mask_and_schedule_return_the_conditioning_itself(method):
    _, cond = method
    conditioning = cond(1.3)
    for mask in (None, torch.ones(1, 8, 8), torch.ones(64, 64)):
        result = apply_mask_and_schedule(conditioning, mask, outside_strength=OUTSIDE)
        assert len(result) == 1
        assert result[0] is conditioning[0]
    assert len(apply_mask_and_schedule(conditioning, torch.full((8, 8), 0.5), outside_strength=OUTSIDE)) == 2


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_empty_mask_is_the_outside_strength_bit_for_bit(method, strength):
    model, cond = method
    result = apply_mask_and_schedule(cond(strength), torch.zeros(1, 8, 8), outside_strength=OUTSIDE)
    assert len(result) == 1
    assert "mask" not in result[0][1]
    expected = velocity_of(model, X, SIGMA, cond(OUTSIDE))
    assert torch.equal(velocity_of(model, X, SIGMA, result), expected)
    assert differ(expected, velocity_of(model, X, SIGMA, cond(strength)))
    suppressed = apply_mask_and_schedule(cond(0.0), torch.zeros(1, 8, 8), outside_strength=1.0)
    assert torch.equal(velocity_of(model, X, SIGMA, suppressed), velocity_of(model, X, SIGMA, cond(1.0)))


@pytest.mark.parametrize("strength", [1.0, (0.3, 1.0, 1.6)])
@pytest.mark.parametrize("references", [0, 1])
def test_strengths_inside_and_outside_the_mask(method, strength, references):
    """Each latent pixel has the prediction of its side; fractional mask values mix the two."""
    model, cond = method
    options = {"reference_latents": [noise(1, 16, 4, 4)] * references} if references else {}
    x = X.repeat(len(strength) if isinstance(strength, tuple) else 1, 1, 1, 1)
    soft = LEFT.clone()
    soft[..., 4] = 0.25
    inside, outside = (velocity_of(model, x, SIGMA, cond(s, **options)) for s in (strength, OUTSIDE))
    result = velocity_of(
        model, x, SIGMA, apply_mask_and_schedule(cond(strength, **options), soft, outside_strength=OUTSIDE)
    )
    assert differ(inside, outside)
    assert near(result[..., :4], inside[..., :4])
    assert near(result[..., 5:], outside[..., 5:])
    assert near(result[..., 4], 0.25 * inside[..., 4] + 0.75 * outside[..., 4])


def test_gstloras_of_the_model_follow_the_mask(golden_model, gst, st):
    def model(*strengths: object):
        patched = apply_stlora(golden_model, st)
        for strength in strengths:
            patched = apply_gstlora(patched, gst, strength)
        return patched

    inside = velocity_of(model(0.9, 1.2), X, SIGMA, at(1.0))
    outside = velocity_of(model(OUTSIDE, OUTSIDE), X, SIGMA, at(OUTSIDE))
    split = apply_mask_and_schedule(at(1.0), LEFT, outside_strength=OUTSIDE)
    result = velocity_of(model(0.9, 1.2), X, SIGMA, split)
    assert differ(inside, outside)
    assert near(result[..., :4], inside[..., :4])
    assert near(result[..., 4:], outside[..., 4:])
    sweep, x = model((0.2, 1.0, 1.5)), X.repeat(3, 1, 1, 1)
    other = plain(seed=5)
    together = velocity_of(sweep, x, SIGMA, apply_mask_and_schedule(plain(), LEFT, outside_strength=OUTSIDE), other)
    inside = velocity_of(sweep, x, SIGMA, plain())
    assert near(together[:3, ..., :4], inside[..., :4])
    outside = velocity_of(model(OUTSIDE), x, SIGMA, plain())
    assert near(together[:3, ..., 4:], outside[..., 4:])
    assert near(together[3:], velocity_of(sweep, x, SIGMA, other))


def test_prompt_without_strengths(golden_model, st):
    """Unset strengths are 1; the outside strength also acts on a channel that has no strengths."""
    model = apply_stlora(golden_model, st, "unset channel")
    spanned = attach_spans(plain(), TEXT_TOKENS, SPANS)
    result = velocity_of(model, X, SIGMA, apply_mask_and_schedule(spanned, torch.zeros(8, 8)))
    assert torch.equal(result, velocity_of(apply_stlora(golden_model, st), X, SIGMA, at(0.0, 0.0)))
    assert near(
        velocity_of(model, X, SIGMA, apply_mask_and_schedule(plain(), LEFT)),
        velocity_of(golden_model, X, SIGMA, plain()),
    )


def test_several_entries_with_their_own_masks(golden_model, st):
    model = apply_stlora(golden_model, st)
    top = torch.zeros(1, 16, 16)
    top[:, :8] = 1
    entries = [*at(1.4, mask=top, mask_strength=2.0), *at(0.7, seed=5)]
    inside, outside = (
        velocity_of(model, X, SIGMA, [*at(a, mask=top, mask_strength=2.0), *at(b, seed=5)])
        for a, b in ((1.4, 0.7), (0.0, 0.0))
    )
    split = apply_mask_and_schedule(entries, LEFT)
    assert len(split) == 4
    result = velocity_of(model, X, SIGMA, split)
    assert differ(inside, outside)
    assert near(result[..., :4], inside[..., :4])
    assert near(result[..., 4:], outside[..., 4:])
    right = apply_mask_and_schedule(at(1.4, mask=1 - LEFT), LEFT)
    assert len(right) == 1
    assert torch.equal(right[0][1]["mask"], 1 - LEFT)


def test_chained_masks_and_schedules(golden_model, st):
    """Chained masks multiply, chained schedules intersect; strengths may be set before or after."""
    model = apply_stlora(golden_model, st)
    top = torch.zeros(1, 8, 8)
    top[:, :4] = 1
    chained = apply_mask_and_schedule(apply_mask_and_schedule(at(1.5), LEFT), top)
    assert len(chained) == 3
    assert near(
        velocity_of(model, X, SIGMA, chained),
        velocity_of(model, X, SIGMA, apply_mask_and_schedule(at(1.5), LEFT * top)),
    )
    spanned = attach_spans(plain(), TEXT_TOKENS, SPANS[:1])
    later = set_strengths(apply_mask_and_schedule(spanned, LEFT), {"strength_1": 1.5})
    assert torch.equal(
        velocity_of(model, X, SIGMA, later), velocity_of(model, X, SIGMA, apply_mask_and_schedule(at(1.5), LEFT))
    )
    twice = apply_mask_and_schedule(apply_mask_and_schedule(at(1.5), start=0.1, end=0.6), start=0.4)
    for sigma, strength in ((0.8, 0.0), (0.5, 1.5), (0.2, 0.0)):
        assert torch.equal(
            velocity_of(model, X, in_schedule(model, 1 - sigma), twice),
            velocity_of(model, X, in_schedule(model, 1 - sigma), at(strength)),
        )


def in_schedule(model, percent: float) -> float:
    return model.model.model_sampling.percent_to_sigma(percent)


def test_each_sigma_has_one_strength_at_the_borders_too(golden_model, st):
    """At and next to the borders the range is that of ComfyUI's start_percent and end_percent."""
    model = apply_stlora(golden_model, st)
    start, end = 0.3, 0.55
    split = apply_mask_and_schedule(at(1.5), start=start, end=end, outside_strength=OUTSIDE)
    assert len(split) == 1
    own_range = [[cond, {**options, "start_percent": start, "end_percent": end}] for cond, options in at(1.5)]
    outcomes = []
    for percent in (start, end):
        border = torch.tensor(in_schedule(model, percent), dtype=torch.float32)
        beyond = [torch.nextafter(border, torch.tensor(to)) for to in (0.0, 1.0)]
        for sigma in (border, *beyond):
            velocity = velocity_of(model, X, sigma.item(), own_range)
            active = differ(X, velocity * sigma)  # if ComfyUI skips the entry, its prediction is 0
            expected = velocity_of(model, X, sigma.item(), at(1.5 if active else OUTSIDE))
            assert torch.equal(velocity_of(model, X, sigma.item(), split), expected), (percent, sigma)
            outcomes.append(active)
    assert outcomes == [True, True, False, True, False, True]


FIRST, SECOND = (0.3, 1.6)
TOP = torch.zeros(1, 8, 8)
TOP[:, :4] = 1


@pytest.mark.parametrize("strengths", [(FIRST, SECOND), (1.0, 1.0), ((0.3, 1.4), SECOND)])
def test_mask_for_one_instruction(golden_model, st, gst, strengths):
    """The other instruction and a GSTLoRA keep their strengths everywhere."""
    model = apply_gstlora(apply_stlora(golden_model, st), gst, 0.7)
    x = X.repeat(2, 1, 1, 1) if isinstance(strengths[0], tuple) else X
    conditioning = at(*strengths)
    split = apply_mask_and_schedule(conditioning, LEFT, outside_strength=OUTSIDE, instructions=[2])
    inside, outside = (velocity_of(model, x, SIGMA, at(strengths[0], second)) for second in (strengths[1], OUTSIDE))
    result = velocity_of(model, x, SIGMA, split)
    assert differ(inside, outside)
    assert near(result[..., :4], inside[..., :4])
    assert near(result[..., 4:], outside[..., 4:])
    assert torch.equal(velocity_of(model, x, SIGMA, conditioning), inside)


def test_each_instruction_has_its_own_mask(golden_model, st):
    """Two masks give four quarters; on the default channel, another one, and one without strengths."""
    for channel, set_on, unset_strength in (
        ("default", "default", None),
        ("other", "other", None),
        ("third", "other", 1.0),
    ):
        model = apply_stlora(golden_model, st, channel)
        strengths = (FIRST, SECOND) if unset_strength is None else (unset_strength, unset_strength)
        split = apply_mask_and_schedule(
            at(FIRST, SECOND, channel=set_on), LEFT, instructions=[1], outside_strength=OUTSIDE
        )
        split = apply_mask_and_schedule(split, TOP, instructions=[2], outside_strength=0.0)
        assert len(split) == 4
        result = velocity_of(model, X, SIGMA, split)
        for rows, second in ((slice(0, 4), strengths[1]), (slice(4, 8), 0.0)):
            for columns, first in ((slice(0, 4), strengths[0]), (slice(4, 8), OUTSIDE)):
                expected = velocity_of(model, X, SIGMA, at(first, second, channel=channel))
                assert near(result[..., rows, columns], expected[..., rows, columns])


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_each_instruction_has_its_own_schedule(golden_model, st, start, end):
    """The second instruction acts in the first half only; each sigma, borders included, has exactly one entry."""
    model = apply_stlora(golden_model, st)
    split = apply_mask_and_schedule(at(FIRST, SECOND), None, start, end, OUTSIDE, instructions=[1])
    split = apply_mask_and_schedule(split, None, 0.0, 0.5, 0.0, instructions=[2])
    combinations = set()
    for percent in (0.05, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9):
        sigma = torch.tensor(in_schedule(model, percent), dtype=torch.float32)
        sampling = model.model.model_sampling.percent_to_sigma
        first, second = (in_schedule_range(sigma, sampling, *limits) for limits in ((start, end), (0.0, 0.5)))
        expected = velocity_of(model, X, sigma.item(), at(FIRST if first else OUTSIDE, SECOND if second else 0.0))
        assert torch.equal(velocity_of(model, X, sigma.item(), split), expected)
        combinations.add((first, second))
    assert len(combinations) > 1
    both = apply_mask_and_schedule(at(FIRST, SECOND), LEFT, start, end, OUTSIDE, instructions=[1])
    for percent in (0.05, 0.6, 0.9):
        sigma = torch.tensor(in_schedule(model, percent), dtype=torch.float32)
        active = in_schedule_range(sigma, model.model.model_sampling.percent_to_sigma, start, end)
        mask = LEFT if active else torch.zeros(8, 8)
        expected = apply_mask_and_schedule(at(FIRST, SECOND), mask, outside_strength=OUTSIDE, instructions=[1])
        assert near(velocity_of(model, X, sigma.item(), both), velocity_of(model, X, sigma.item(), expected))


def test_masks_for_all_and_for_one_instruction(golden_model, st, gst):
    """In both orders, and with a schedule range that the conditioning already has."""
    model = apply_gstlora(apply_stlora(golden_model, st), gst, 0.7)
    off = apply_gstlora(apply_stlora(golden_model, st), gst, 0.0)
    after = apply_mask_and_schedule(apply_mask_and_schedule(at(FIRST, SECOND), LEFT), TOP, instructions=[2])
    before = apply_mask_and_schedule(apply_mask_and_schedule(at(FIRST, SECOND), TOP, instructions=[2]), LEFT)
    for split in (after, before):
        result = velocity_of(model, X, SIGMA, split)
        outside = velocity_of(off, X, SIGMA, at(0.0, 0.0))
        assert near(result[..., 4:], outside[..., 4:])
        for rows, second in ((slice(0, 4), SECOND), (slice(4, 8), 0.0)):
            expected = velocity_of(model, X, SIGMA, at(FIRST, second))
            assert near(result[..., rows, :4], expected[..., rows, :4])
    early = [[cond, {**options, "start_percent": 0.0, "end_percent": 0.4}] for cond, options in at(FIRST, SECOND)]
    split = apply_mask_and_schedule(early, None, 0.2, 1.0, instructions=[1])
    ranges = [(options["start_percent"], options["end_percent"]) for _, options in split]
    assert ranges == [(0.0, pytest.approx(0.2, abs=1e-4)), (pytest.approx(0.2, abs=1e-4), 0.4)]


def test_phrases_selected_later_keep_the_strengths(golden_model, st):
    """An overlapping phrase selected afterwards changes no strengths, on their channel and with a mask."""
    model = apply_stlora(golden_model, st)
    first = set_strengths(attach_spans(plain(), TEXT_TOKENS, SPANS[:1]), {"strength_1": FIRST, "strength_2": 1.0})
    both = attach_spans(first, TEXT_TOKENS, [Span("inside", (3, 4))])
    expected = velocity_of(model, X, SIGMA, first)
    assert differ(expected, velocity_of(model, X, SIGMA, plain()))
    assert torch.equal(velocity_of(model, X, SIGMA, both), expected)
    other = set_strengths(both, {"strength_1": 1.0, "strength_2": 0.2}, "other")
    assert torch.equal(velocity_of(model, X, SIGMA, other), expected)
    nothing = apply_mask_and_schedule(both, LEFT, outside_strength=1.0, instructions=[2])
    assert near(velocity_of(model, X, SIGMA, nothing), expected)
    off = apply_mask_and_schedule(both, torch.zeros(8, 8), outside_strength=0.0, instructions=[2])
    overlapping = set_strengths(both, {"strength_1": FIRST, "strength_2": 0.0})
    assert torch.equal(velocity_of(model, X, SIGMA, off), velocity_of(model, X, SIGMA, overlapping))


def test_schedule_range_set_afterwards_is_rejected(golden_model, st):
    """It would activate both entries at once."""
    model = apply_stlora(golden_model, st)
    split = apply_mask_and_schedule(at(FIRST, SECOND), None, 0.0, 0.5, instructions=[1])
    ranged = conditioning_set_values(split, {"start_percent": 0.0, "end_percent": 0.9})
    with pytest.raises(SliderError, match="expected it before that node"):
        velocity_of(model, X, in_schedule(model, 0.3), ranged)


def test_errors_with_instructions(golden_model):
    with pytest.raises(SliderError, match="no instruction 3; expected numbers from 1 to 2: 1 = 'first'; 2 = 'seco"):
        apply_mask_and_schedule(at(FIRST, SECOND), LEFT, instructions=[1, 3])
    with pytest.raises(SliderError, match="no instruction 0"):
        apply_mask_and_schedule(at(FIRST, SECOND), LEFT, instructions=[0])
    with pytest.raises(SliderError, match="has no instructions"):
        apply_mask_and_schedule(plain(), LEFT, instructions=[1])
    masked = apply_mask_and_schedule(at(FIRST, SECOND), LEFT, instructions=[1])
    with pytest.raises(SliderError, match="expected strengths before it"):
        set_strengths(masked, {"strength_1": 0.5, "strength_2": 0.5})
    with pytest.raises(SliderError, match="expected 'Select Phrase' before it"):
        attach_spans(masked, TEXT_TOKENS, SPANS)
    with pytest.raises(SliderError, match=r"0\.0 for all sliders, a later one 0\.5 for some"):
        apply_mask_and_schedule(
            apply_mask_and_schedule(at(FIRST, SECOND), LEFT), TOP, outside_strength=0.5, instructions=[2]
        )


def sampled(model, positive: list, steps: int, x: torch.Tensor = X) -> torch.Tensor:
    return comfy.sample.sample(
        model, x, steps, 1.0, "euler", "simple", positive, positive, torch.zeros_like(x), disable_pbar=True
    )


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_sampling_equals_switching_strengths_by_hand(golden_model, st, gst, start, end):
    model = apply_gstlora(apply_stlora(golden_model, st), gst, 0.9)
    suppressed = apply_gstlora(apply_stlora(golden_model, st), gst, OUTSIDE)
    result = sampled(model, apply_mask_and_schedule(at(1.4), start=start, end=end, outside_strength=OUTSIDE), 8)
    sampling = golden_model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 8)
    first, last = (torch.tensor(sampling.percent_to_sigma(p), dtype=torch.float32) for p in (start, end))
    x, active_steps = X * sigmas[0], []
    for sigma, following in pairwise(sigmas):
        active = bool(last <= sigma <= first)
        active_steps.append(active)
        patched, cond = (model, at(1.4)) if active else (suppressed, at(OUTSIDE))
        x = x + (following - sigma) * velocity_of(patched, x, sigma.item(), cond)
    assert 0 < sum(active_steps) < 8
    expected = golden_model.model.process_latent_out(x)
    assert near(result, expected)
    assert differ(result, sampled(model, at(1.4), 8))


def test_model_and_other_conds_are_unchanged(golden_model, method, gst):
    model, cond = method
    model = apply_gstlora(model, gst, 0.7)
    before = [velocity_of(m, X, SIGMA, cond(1.4)) for m in (model, golden_model)]
    conds = apply_mask_and_schedule(cond(1.4), LEFT, start=0.1, end=0.9), plain(seed=5)
    together = velocity_of(model, X, SIGMA, *conds)
    assert near(together[1:], velocity_of(model, X, SIGMA, conds[1]))
    assert all(torch.equal(b, velocity_of(m, X, SIGMA, cond(1.4))) for b, m in zip(before, (model, golden_model)))
    assert near(before[1], velocity_of(golden_model, X, SIGMA, conds[0]))


def test_torch_compile(golden_model, st, gst):
    torch._dynamo.reset()
    model = apply_gstlora(apply_stlora(golden_model, st), gst, 0.6)
    split = apply_mask_and_schedule(at(1.4), LEFT, start=0.1)
    assert near(velocity_of(compiled(model), X, SIGMA, split), velocity_of(model, X, SIGMA, split))


def test_number_of_masks_must_match_the_batch(golden_model, st):
    model = apply_stlora(golden_model, st)
    for masks, images in ((3, 7), (2, 4), (5, 2)):
        masked = apply_mask_and_schedule(at(0.5), torch.rand(masks, 8, 8))
        with pytest.raises(SliderError, match=f"{masks} masks for a batch of {images} image"):
            velocity_of(model, noise(images, 16, 8, 8, seed=9), SIGMA, masked)


def test_prompt_differences_are_rejected():
    cond = at(1.0)
    differences = PromptDifferences("first", [Span("first", (2, 3, 4))], cond, [cond])
    with pytest.raises(SliderError, match="Prompt Difference"):
        apply_mask_and_schedule(differences.with_strengths({"strength_1": 0.5}), torch.zeros(8, 8))


def test_errors(golden_model, bundle):
    for start, end in ((0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(SliderError, match=r"expected 0 <= start < end <= 1"):
            apply_mask_and_schedule(at(0.5), start=start, end=end)
    with pytest.raises(SliderError, match=r"shape \(1, 1, 8, 8\)"):
        apply_mask_and_schedule(at(0.5), LEFT[None])
    for invalid in (LEFT * 2, LEFT - 1, LEFT * torch.nan):
        with pytest.raises(SliderError, match="expected 0"):
            apply_mask_and_schedule(at(0.5), invalid)
    with pytest.raises(SliderError, match="outside_strength"):
        apply_mask_and_schedule(at(0.5), outside_strength=1000.0)
    with pytest.raises(SliderError, match="mask bounds"):
        apply_mask_and_schedule(at(0.5, mask=LEFT, set_area_to_bounds=True), LEFT)
    with pytest.raises(SliderError, match="default"):
        apply_mask_and_schedule(at(0.5, default=True), LEFT)
    masked = apply_mask_and_schedule(at(0.5), LEFT)
    with pytest.raises(SliderError, match="expected 'Select Phrase' before it"):
        attach_spans(masked, TEXT_TOKENS, SPANS)
    with pytest.raises(SliderError, match="expected 'Projector Strength' before it"):
        set_projector_strength(masked, bundle, 0.5)
    with pytest.raises(SliderError, match=r"outside strength 0\.0, a later one with a schedule has 0\.5"):
        apply_mask_and_schedule(masked, end=0.5, outside_strength=0.5)


# --- graphs on a server

PROMPT = "make the cat older\nmake the wall golden"


def mask(g: Graph, value: float, half: bool = False) -> Link:
    full = g.add("SolidMask", value=0.0 if half else value, width=64, height=64)
    if not half:
        return full
    left = g.add("SolidMask", value=value, width=32, height=64)
    return g.add("MaskComposite", destination=full, source=left, x=0, y=0, operation="add")


def masked(g: Graph, conditioning: Link, **more) -> Link:
    inputs = {"start": 0.0, "end": 1.0, "elsewhere": 0.0, "sub_instructions": "", **more}
    return g.add("EditSlidersWhereAndWhen", conditioning=conditioning, **inputs)


def run(strength: float, gstlora: float, inputs: Callable[[Graph], dict] | None = None, late: bool = False, **more):
    def build(g: Graph) -> Link:
        cond = g.strengths(g.instructions(PROMPT), strength)
        if inputs and not late:
            cond = masked(g, cond, **inputs(g))
        cond = g.edited(cond)
        if inputs and late:
            cond = masked(g, cond, **inputs(g))
        return g.sample(g.gstlora(g.stlora(g.model()), gstlora), cond, **more)

    return build


def off(**more) -> Callable[[Graph], Link]:
    def build(g: Graph) -> Link:
        cond = g.edited(g.strengths(g.instructions(PROMPT), 0.0, 0.0))
        return g.sample(g.gstlora(g.stlora(g.model()), 0.0), cond, **more)

    return build


def test_graphs(server):
    full, none, ones, zeros, half, late, early, second_alone, no_first = latents(
        server,
        run(1.4, 0.8),
        off(),
        run(1.4, 0.8, lambda g: {"mask": mask(g, 1.0)}),
        run(1.4, 0.8, lambda g: {"mask": mask(g, 0.0)}),
        run(1.4, 0.8, lambda g: {"mask": mask(g, 1.0, half=True)}),
        run(1.4, 0.8, lambda g: {"mask": mask(g, 1.0, half=True)}, late=True),
        run(1.4, 0.8, lambda g: {"end": 0.4}),
        run(0.0, 0.8),
        run(1.4, 0.8, lambda g: {"mask": mask(g, 0.0), "sub_instructions": "1"}),
    )
    assert np.array_equal(ones, full)
    assert np.array_equal(zeros, none)
    assert np.array_equal(half, late)
    assert np.array_equal(no_first, second_alone)
    assert differ(no_first, none)
    for mixed in (half, early):
        assert differ(mixed, full)
        assert differ(mixed, none)
    one, two, mixed = latents(
        server,
        run(1.4, 0.8, steps=1),
        off(steps=1),
        run(1.4, 0.8, lambda g: {"mask": mask(g, 1.0, half=True)}, steps=1),
    )
    assert near(mixed[..., :4], one[..., :4])
    assert near(mixed[..., 4:], two[..., 4:])
    assert differ(one[..., :4], two[..., :4])


def test_branches_repeated_and_interrupted_runs(server):
    masked_inputs = {"inputs": lambda g: {"mask": mask(g, 1.0, half=True), "end": 0.7}}
    builders = [
        run(1.4, 0.8, **masked_inputs),
        run(1.4, 0.8),
        lambda g: g.sample(g.model(), g.edited(g.instructions(PROMPT))),
    ]
    first = latents(server, *builders)
    assert differ(first[0], first[1])
    graph = Graph()
    graph.save(run(1.4, 0.8, **masked_inputs, steps=2000)(graph))
    prompt = server.submit(graph)
    time.sleep(2)
    server.interrupt()
    assert server.wait(prompt).interrupted
    server.free()
    for build, expected in zip(builders, first):
        assert np.array_equal(latents(server, build)[0], expected)
