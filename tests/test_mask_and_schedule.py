"""Where and when sliders act: single model calls, whole runs, whole graphs."""

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
from support.outcomes import far, latents, near

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
SIGMA, ROWS = 0.7, 24
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
    place = tmp_path_factory.mktemp("projector") / "slider_projector.pth"
    torch.save(recipe.projector_weights(manifest["model"], manifest["adapters"]["projector"]), place)
    return read_projector(place, EXAMPLES / "kk_pytorch_lora_weights.safetensors")


def plain(seed: int = 1, **options) -> list:
    pooled = noise(1, 768, seed=seed + 1)
    return [[noise(1, ROWS, 64, seed=seed), {"pooled_output": pooled, "guidance": 3.5, **options}]]


def at(*strengths: object, channel: str = "default", **options) -> list:
    spanned = attach_spans(plain(**options), ROWS, SPANS[: len(strengths)])
    return set_strengths(spanned, {f"strength_{k}": s for k, s in enumerate(strengths, 1)}, channel)


Method = tuple[Callable, Callable]
"""model -> the model with sliders; strength (one, or one per image) -> their conditioning."""


@pytest.fixture(params=["STLoRA", "two STLoRAs", "text modulation", "projector", "all at once"])
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
        "all at once": (
            lambda m: apply_projector(apply_text_modulation(apply_stlora(m, st), "other"), bundle),
            lambda s, **o: set_projector_strength(channels(s, **o), bundle, s),
        ),
    }[request.param]
    return apply(golden_model), cond


def test_everywhere_and_always_is_the_conditioning_itself(method):
    _, cond = method
    given = cond(1.3)
    for mask in (None, torch.ones(1, 8, 8), torch.ones(64, 64)):
        found = apply_mask_and_schedule(given, mask, outside_strength=OUTSIDE)
        assert len(found) == 1
        assert found[0] is given[0]
    assert len(apply_mask_and_schedule(given, torch.full((8, 8), 0.5), outside_strength=OUTSIDE)) == 2


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_nowhere_is_the_strength_elsewhere_bit_for_bit(method, strength):
    model, cond = method
    found = apply_mask_and_schedule(cond(strength), torch.zeros(1, 8, 8), outside_strength=OUTSIDE)
    assert len(found) == 1
    assert "mask" not in found[0][1]
    want = velocity_of(model, X, SIGMA, cond(OUTSIDE))
    assert torch.equal(velocity_of(model, X, SIGMA, found), want)
    assert far(want, velocity_of(model, X, SIGMA, cond(strength)))
    suppressed = apply_mask_and_schedule(cond(0.0), torch.zeros(1, 8, 8), outside_strength=1.0)
    assert torch.equal(velocity_of(model, X, SIGMA, suppressed), velocity_of(model, X, SIGMA, cond(1.0)))


@pytest.mark.parametrize("strength", [1.0, (0.3, 1.0, 1.6)])
@pytest.mark.parametrize("references", [0, 1])
def test_each_side_of_a_mask_has_its_own_strength(method, strength, references):
    """Pixel by pixel the one prediction or the other, and their mixture where the mask is between."""
    model, cond = method
    options = {"reference_latents": [noise(1, 16, 4, 4)] * references} if references else {}
    x = X.repeat(len(strength) if isinstance(strength, tuple) else 1, 1, 1, 1)
    soft = LEFT.clone()
    soft[..., 4] = 0.25
    own, rest = (velocity_of(model, x, SIGMA, cond(s, **options)) for s in (strength, OUTSIDE))
    found = velocity_of(
        model, x, SIGMA, apply_mask_and_schedule(cond(strength, **options), soft, outside_strength=OUTSIDE)
    )
    assert far(own, rest)
    assert near(found[..., :4], own[..., :4])
    assert near(found[..., 5:], rest[..., 5:])
    assert near(found[..., 4], 0.25 * own[..., 4] + 0.75 * rest[..., 4])


def test_gstloras_on_the_model_obey_too(golden_model, gst, st):
    def model(*strengths: object):
        patched = apply_stlora(golden_model, st)
        for strength in strengths:
            patched = apply_gstlora(patched, gst, strength)
        return patched

    own = velocity_of(model(0.9, 1.2), X, SIGMA, at(1.0))
    rest = velocity_of(model(OUTSIDE, OUTSIDE), X, SIGMA, at(OUTSIDE))
    split = apply_mask_and_schedule(at(1.0), LEFT, outside_strength=OUTSIDE)
    found = velocity_of(model(0.9, 1.2), X, SIGMA, split)
    assert far(own, rest)
    assert near(found[..., :4], own[..., :4])
    assert near(found[..., 4:], rest[..., 4:])
    sweep, x = model((0.2, 1.0, 1.5)), X.repeat(3, 1, 1, 1)
    other = plain(seed=5)
    together = velocity_of(sweep, x, SIGMA, apply_mask_and_schedule(plain(), LEFT, outside_strength=OUTSIDE), other)
    own = velocity_of(sweep, x, SIGMA, plain())
    assert near(together[:3, ..., :4], own[..., :4])
    rest = velocity_of(model(OUTSIDE), x, SIGMA, plain())
    assert near(together[:3, ..., 4:], rest[..., 4:])
    assert near(together[3:], velocity_of(sweep, x, SIGMA, other))


def test_a_sole_prompt_with_spans_or_none(golden_model, st):
    """Strengths that were never set are 1; a channel that nobody named is a channel too."""
    model = apply_stlora(golden_model, st, "nobody named it")
    spanned = attach_spans(plain(), ROWS, SPANS)
    found = velocity_of(model, X, SIGMA, apply_mask_and_schedule(spanned, torch.zeros(8, 8)))
    assert torch.equal(found, velocity_of(apply_stlora(golden_model, st), X, SIGMA, at(0.0, 0.0)))
    assert near(
        velocity_of(model, X, SIGMA, apply_mask_and_schedule(plain(), LEFT)),
        velocity_of(golden_model, X, SIGMA, plain()),
    )


def test_several_entries_and_masks_of_their_own(golden_model, st):
    model = apply_stlora(golden_model, st)
    top = torch.zeros(1, 16, 16)
    top[:, :8] = 1
    entries = [*at(1.4, mask=top, mask_strength=2.0), *at(0.7, seed=5)]
    own, rest = (
        velocity_of(model, X, SIGMA, [*at(a, mask=top, mask_strength=2.0), *at(b, seed=5)])
        for a, b in ((1.4, 0.7), (0.0, 0.0))
    )
    split = apply_mask_and_schedule(entries, LEFT)
    assert len(split) == 4
    found = velocity_of(model, X, SIGMA, split)
    assert far(own, rest)
    assert near(found[..., :4], own[..., :4])
    assert near(found[..., 4:], rest[..., 4:])
    right = apply_mask_and_schedule(at(1.4, mask=1 - LEFT), LEFT)
    assert len(right) == 1
    assert torch.equal(right[0][1]["mask"], 1 - LEFT)


def test_one_after_the_other(golden_model, st):
    """Two masks: their common part; two schedules: likewise. Order of strengths and place does not matter."""
    model = apply_stlora(golden_model, st)
    top = torch.zeros(1, 8, 8)
    top[:, :4] = 1
    chained = apply_mask_and_schedule(apply_mask_and_schedule(at(1.5), LEFT), top)
    assert len(chained) == 3
    assert near(
        velocity_of(model, X, SIGMA, chained),
        velocity_of(model, X, SIGMA, apply_mask_and_schedule(at(1.5), LEFT * top)),
    )
    spanned = attach_spans(plain(), ROWS, SPANS[:1])
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


def test_all_steps_have_one_strength_borders_included(golden_model, st):
    """Noise levels around and exactly at the borders: what ComfyUI does for an entry's own range."""
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
            inside = velocity_of(model, X, sigma.item(), own_range)
            acts = far(X, inside * sigma)  # ComfyUI left the entry out: it predicted 0
            want = velocity_of(model, X, sigma.item(), at(1.5 if acts else OUTSIDE))
            assert torch.equal(velocity_of(model, X, sigma.item(), split), want), (percent, sigma)
            outcomes.append(acts)
    assert outcomes == [True, True, False, True, False, True]


FIRST, SECOND = (0.3, 1.6)
TOP = torch.zeros(1, 8, 8)
TOP[:, :4] = 1


@pytest.mark.parametrize("strengths", [(FIRST, SECOND), (1.0, 1.0), ((0.3, 1.4), SECOND)])
def test_a_place_for_one_sub_instruction(golden_model, st, gst, strengths):
    """The other keeps its strength everywhere, and so does a GSTLoRA; on a channel of its own too."""
    model = apply_gstlora(apply_stlora(golden_model, st), gst, 0.7)
    x = X.repeat(2, 1, 1, 1) if isinstance(strengths[0], tuple) else X
    given = at(*strengths)
    split = apply_mask_and_schedule(given, LEFT, outside_strength=OUTSIDE, instructions=[2])
    own, rest = (velocity_of(model, x, SIGMA, at(strengths[0], second)) for second in (strengths[1], OUTSIDE))
    found = velocity_of(model, x, SIGMA, split)
    assert far(own, rest)
    assert near(found[..., :4], own[..., :4])
    assert near(found[..., 4:], rest[..., 4:])
    assert torch.equal(velocity_of(model, x, SIGMA, given), own)


def test_each_sub_instruction_has_its_own_mask(golden_model, st):
    """Four quarters, four mixtures; the channels are the default one, another, and one without strengths."""
    for channel, set_on, rest in (("default", "default", None), ("other", "other", None), ("third", "other", 1.0)):
        model = apply_stlora(golden_model, st, channel)
        own = (FIRST, SECOND) if rest is None else (rest, rest)
        split = apply_mask_and_schedule(
            at(FIRST, SECOND, channel=set_on), LEFT, instructions=[1], outside_strength=OUTSIDE
        )
        split = apply_mask_and_schedule(split, TOP, instructions=[2], outside_strength=0.0)
        assert len(split) == 4
        found = velocity_of(model, X, SIGMA, split)
        for rows, second in ((slice(0, 4), own[1]), (slice(4, 8), 0.0)):
            for columns, first in ((slice(0, 4), own[0]), (slice(4, 8), OUTSIDE)):
                want = velocity_of(model, X, SIGMA, at(first, second, channel=channel))
                assert near(found[..., rows, columns], want[..., rows, columns])


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_each_sub_instruction_has_its_own_time(golden_model, st, start, end):
    """The other one acts in the first half only; no step has two of the entries, noise levels on borders included."""
    model = apply_stlora(golden_model, st)
    split = apply_mask_and_schedule(at(FIRST, SECOND), None, start, end, OUTSIDE, instructions=[1])
    split = apply_mask_and_schedule(split, None, 0.0, 0.5, 0.0, instructions=[2])
    seen = set()
    for percent in (0.05, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9):
        sigma = torch.tensor(in_schedule(model, percent), dtype=torch.float32)
        sampling = model.model.model_sampling.percent_to_sigma
        first, second = (in_schedule_range(sigma, sampling, *part) for part in ((start, end), (0.0, 0.5)))
        want = velocity_of(model, X, sigma.item(), at(FIRST if first else OUTSIDE, SECOND if second else 0.0))
        assert torch.equal(velocity_of(model, X, sigma.item(), split), want)
        seen.add((first, second))
    assert len(seen) > 1
    both = apply_mask_and_schedule(at(FIRST, SECOND), LEFT, start, end, OUTSIDE, instructions=[1])
    for percent in (0.05, 0.6, 0.9):
        sigma = torch.tensor(in_schedule(model, percent), dtype=torch.float32)
        acts = in_schedule_range(sigma, model.model.model_sampling.percent_to_sigma, start, end)
        mask = LEFT if acts else torch.zeros(8, 8)
        want = apply_mask_and_schedule(at(FIRST, SECOND), mask, outside_strength=OUTSIDE, instructions=[1])
        assert near(velocity_of(model, X, sigma.item(), both), velocity_of(model, X, sigma.item(), want))


def test_places_for_some_beside_others(golden_model, st, gst):
    """After a place for all, and before one; and beside a range that the conditioning already has."""
    model = apply_gstlora(apply_stlora(golden_model, st), gst, 0.7)
    off = apply_gstlora(apply_stlora(golden_model, st), gst, 0.0)
    after = apply_mask_and_schedule(apply_mask_and_schedule(at(FIRST, SECOND), LEFT), TOP, instructions=[2])
    before = apply_mask_and_schedule(apply_mask_and_schedule(at(FIRST, SECOND), TOP, instructions=[2]), LEFT)
    for split in (after, before):
        found = velocity_of(model, X, SIGMA, split)
        rest = velocity_of(off, X, SIGMA, at(0.0, 0.0))
        assert near(found[..., 4:], rest[..., 4:])
        for rows, second in ((slice(0, 4), SECOND), (slice(4, 8), 0.0)):
            want = velocity_of(model, X, SIGMA, at(FIRST, second))
            assert near(found[..., rows, :4], want[..., rows, :4])
    early = [[cond, {**options, "start_percent": 0.0, "end_percent": 0.4}] for cond, options in at(FIRST, SECOND)]
    parts = apply_mask_and_schedule(early, None, 0.2, 1.0, instructions=[1])
    ranges = [(options["start_percent"], options["end_percent"]) for _, options in parts]
    assert ranges == [(0.0, pytest.approx(0.2, abs=1e-4)), (pytest.approx(0.2, abs=1e-4), 0.4)]


def test_phrases_that_come_later_leave_the_others_alone(golden_model, st):
    """An overlapping phrase, selected after strengths were set: they hold as before, on their channel and in parts."""
    model = apply_stlora(golden_model, st)
    first = set_strengths(attach_spans(plain(), ROWS, SPANS[:1]), {"strength_1": FIRST, "strength_2": 1.0})
    both = attach_spans(first, ROWS, [Span("inside", (3, 4))])
    want = velocity_of(model, X, SIGMA, first)
    assert far(want, velocity_of(model, X, SIGMA, plain()))
    assert torch.equal(velocity_of(model, X, SIGMA, both), want)
    other = set_strengths(both, {"strength_1": 1.0, "strength_2": 0.2}, "other")
    assert torch.equal(velocity_of(model, X, SIGMA, other), want)
    nothing = apply_mask_and_schedule(both, LEFT, outside_strength=1.0, instructions=[2])
    assert near(velocity_of(model, X, SIGMA, nothing), want)
    off = apply_mask_and_schedule(both, torch.zeros(8, 8), outside_strength=0.0, instructions=[2])
    overlapping = set_strengths(both, {"strength_1": FIRST, "strength_2": 0.0})
    assert torch.equal(velocity_of(model, X, SIGMA, off), velocity_of(model, X, SIGMA, overlapping))


def test_a_range_behind_a_part_is_refused(golden_model, st):
    """It would let both entries act at once."""
    model = apply_stlora(golden_model, st)
    split = apply_mask_and_schedule(at(FIRST, SECOND), None, 0.0, 0.5, instructions=[1])
    ranged = conditioning_set_values(split, {"start_percent": 0.0, "end_percent": 0.9})
    with pytest.raises(SliderError, match="expected it before that node"):
        velocity_of(model, X, in_schedule(model, 0.3), ranged)


def test_refused_places_for_some(golden_model):
    with pytest.raises(SliderError, match="no instruction 3; expected numbers from 1 to 2: 1 = 'first'; 2 = 'seco"):
        apply_mask_and_schedule(at(FIRST, SECOND), LEFT, instructions=[1, 3])
    with pytest.raises(SliderError, match="no instruction 0"):
        apply_mask_and_schedule(at(FIRST, SECOND), LEFT, instructions=[0])
    with pytest.raises(SliderError, match="has no instructions"):
        apply_mask_and_schedule(plain(), LEFT, instructions=[1])
    placed = apply_mask_and_schedule(at(FIRST, SECOND), LEFT, instructions=[1])
    with pytest.raises(SliderError, match="expected strengths before it"):
        set_strengths(placed, {"strength_1": 0.5, "strength_2": 0.5})
    with pytest.raises(SliderError, match="expected 'Select Phrase' before it"):
        attach_spans(placed, ROWS, SPANS)
    with pytest.raises(SliderError, match=r"0\.0 for all sliders, a later one 0\.5 for some"):
        apply_mask_and_schedule(
            apply_mask_and_schedule(at(FIRST, SECOND), LEFT), TOP, outside_strength=0.5, instructions=[2]
        )


def sampled(model, positive: list, steps: int, x: torch.Tensor = X) -> torch.Tensor:
    return comfy.sample.sample(
        model, x, steps, 1.0, "euler", "simple", positive, positive, torch.zeros_like(x), disable_pbar=True
    )


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_a_run_equals_switching_by_hand(golden_model, st, gst, start, end):
    model = apply_gstlora(apply_stlora(golden_model, st), gst, 0.9)
    suppressed = apply_gstlora(apply_stlora(golden_model, st), gst, OUTSIDE)
    found = sampled(model, apply_mask_and_schedule(at(1.4), start=start, end=end, outside_strength=OUTSIDE), 8)
    sampling = golden_model.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 8)
    first, last = (torch.tensor(sampling.percent_to_sigma(p), dtype=torch.float32) for p in (start, end))
    x, acted = X * sigmas[0], []
    for now, then in pairwise(sigmas):
        acts = bool(last <= now <= first)
        acted.append(acts)
        patched, cond = (model, at(1.4)) if acts else (suppressed, at(OUTSIDE))
        x = x + (then - now) * velocity_of(patched, x, now.item(), cond)
    assert 0 < sum(acted) < 8
    want = golden_model.model.process_latent_out(x)
    assert near(found, want)
    assert far(found, sampled(model, at(1.4), 8))


def test_nothing_leaks(golden_model, method, gst):
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


def test_masks_that_no_image_has(golden_model, st):
    model = apply_stlora(golden_model, st)
    for masks, images in ((3, 7), (2, 4), (5, 2)):
        placed = apply_mask_and_schedule(at(0.5), torch.rand(masks, 8, 8))
        with pytest.raises(SliderError, match=f"{masks} strengths for a batch of {images} image"):
            velocity_of(model, noise(images, 16, 8, 8, seed=9), SIGMA, placed)


def test_weights_of_prompts_are_refused():
    whole = at(1.0)
    differences = PromptDifferences("first", [Span("first", (2, 3, 4))], whole, [whole])
    with pytest.raises(SliderError, match="Prompt Difference"):
        apply_mask_and_schedule(differences.with_strengths({"strength_1": 0.5}), torch.zeros(8, 8))


def test_what_is_refused(golden_model, bundle):
    for start, end in ((0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(SliderError, match=r"expected 0 <= start < end <= 1"):
            apply_mask_and_schedule(at(0.5), start=start, end=end)
    with pytest.raises(SliderError, match=r"shape \(1, 1, 8, 8\)"):
        apply_mask_and_schedule(at(0.5), LEFT[None])
    for wrong in (LEFT * 2, LEFT - 1, LEFT * torch.nan):
        with pytest.raises(SliderError, match="expected 0"):
            apply_mask_and_schedule(at(0.5), wrong)
    with pytest.raises(SliderError, match="outside_strength"):
        apply_mask_and_schedule(at(0.5), outside_strength=1000.0)
    with pytest.raises(SliderError, match="mask bounds"):
        apply_mask_and_schedule(at(0.5, mask=LEFT, set_area_to_bounds=True), LEFT)
    with pytest.raises(SliderError, match="default"):
        apply_mask_and_schedule(at(0.5, default=True), LEFT)
    placed = apply_mask_and_schedule(at(0.5), LEFT)
    with pytest.raises(SliderError, match="expected 'Select Phrase' before it"):
        attach_spans(placed, ROWS, SPANS)
    with pytest.raises(SliderError, match="expected 'Projector Strength' before it"):
        set_projector_strength(placed, bundle, 0.5)
    with pytest.raises(SliderError, match=r"outside strength 0\.0, a later one with a schedule has 0\.5"):
        apply_mask_and_schedule(placed, end=0.5, outside_strength=0.5)


# --- whole graphs

PROMPT = "make the cat older\nmake the wall golden"


def mask(g: Graph, value: float, half: bool = False) -> Link:
    whole = g.add("SolidMask", value=0.0 if half else value, width=64, height=64)
    if not half:
        return whole
    part = g.add("SolidMask", value=value, width=32, height=64)
    return g.add("MaskComposite", destination=whole, source=part, x=0, y=0, operation="add")


def placed(g: Graph, conditioning: Link, **more) -> Link:
    inputs = {"start": 0.0, "end": 1.0, "elsewhere": 0.0, "sub_instructions": "", **more}
    return g.add("EditSlidersWhereAndWhen", conditioning=conditioning, **inputs)


def run(strength: float, gstlora: float, place: Callable[[Graph], dict] | None = None, late: bool = False, **more):
    def part(g: Graph) -> Link:
        cond = g.strengths(g.instructions(PROMPT), strength)
        if place and not late:
            cond = placed(g, cond, **place(g))
        cond = g.edited(cond)
        if place and late:
            cond = placed(g, cond, **place(g))
        return g.sample(g.gstlora(g.stlora(g.model()), gstlora), cond, **more)

    return part


def off(**more) -> Callable[[Graph], Link]:
    def part(g: Graph) -> Link:
        cond = g.edited(g.strengths(g.instructions(PROMPT), 0.0, 0.0))
        return g.sample(g.gstlora(g.stlora(g.model()), 0.0), cond, **more)

    return part


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
    assert far(no_first, none)
    for mixed in (half, early):
        assert far(mixed, full)
        assert far(mixed, none)
    one, two, mixed = latents(
        server,
        run(1.4, 0.8, steps=1),
        off(steps=1),
        run(1.4, 0.8, lambda g: {"mask": mask(g, 1.0, half=True)}, steps=1),
    )
    assert near(mixed[..., :4], one[..., :4])
    assert near(mixed[..., 4:], two[..., 4:])
    assert far(one[..., :4], two[..., :4])


def test_branches_second_and_interrupted_runs(server):
    place = {"place": lambda g: {"mask": mask(g, 1.0, half=True), "end": 0.7}}
    parts = [run(1.4, 0.8, **place), run(1.4, 0.8), lambda g: g.sample(g.model(), g.edited(g.instructions(PROMPT)))]
    first = latents(server, *parts)
    assert far(first[0], first[1])
    graph = Graph()
    graph.save(run(1.4, 0.8, **place, steps=2000)(graph))
    prompt = server.submit(graph)
    time.sleep(2)
    server.interrupt()
    assert server.wait(prompt).interrupted
    server.free()
    for part, want in zip(parts, first):
        assert np.array_equal(latents(server, part)[0], want)
