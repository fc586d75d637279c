"""Strengths by prompts that lack a sub-instruction: the weights, what the model makes of them, and the texts."""

from __future__ import annotations

from itertools import pairwise

import comfy.sample
import pytest
import torch
from comfy.samplers import calculate_sigmas
from support.comfy_server import PromptRejected
from support.graphs import Graph, Link
from support.model_calls import noise, velocity_of
from support.outcomes import far, latents, near

from slider_core import keys
from slider_core.conditioning.span_strengths import Span
from slider_core.errors import SliderError
from slider_core.text.instructions import join_lines, read_marks, remove_instruction
from slider_core.training_free.prompt_difference import PromptDifferences, PromptWeights

SIGMA, X = 0.7, noise(1, 16, 8, 8, seed=9)
SPANS = [Span("first", (2, 3)), Span("second", (4, 5))]


def text(seed: int) -> list:
    return [[noise(1, 24, 64, seed=seed), {"pooled_output": noise(1, 768, seed=seed + 1), "guidance": 3.5}]]


WHOLE, WITHOUT = text(1), [text(3), text(5)]
DIFFERENCES = PromptDifferences("first and second", SPANS, WHOLE, WITHOUT)


def at(*strengths: object, **place) -> list:
    return DIFFERENCES.with_strengths({f"strength_{k}": s for k, s in enumerate(strengths, 1)}, **place)


def by_hand(model, *strengths: object) -> torch.Tensor:
    """The formula, every velocity by itself; strengths are numbers or maps of (8, 8)."""
    whole = velocity_of(model, X, SIGMA, WHOLE)
    parts = [(s - 1) * (whole - velocity_of(model, X, SIGMA, one)) for s, one in zip(strengths, WITHOUT)]
    return whole + sum(parts)


@pytest.mark.parametrize("strengths", [(0.3, 1.0), (1.6, 0.4), (0.0, 0.0), (-0.5, 2.0), (0.0, 1.0), (0.5, 0.5)])
def test_it_equals_the_formula(golden_model, strengths):
    assert near(velocity_of(golden_model, X, SIGMA, at(*strengths)), by_hand(golden_model, *strengths))


def test_what_weighs_nothing_costs_nothing(golden_model):
    whole = [[cond, {**options, keys.PROMPT_WEIGHTS: PromptWeights()}] for cond, options in WHOLE]
    assert at(1.0, 1.0) == whole
    assert at((1.0, 1.0), 1.0) == whole
    assert at(1.0, 1.0, mask=torch.ones(1, 64, 64)) == whole
    assert [cond for cond, _ in at(0.0, 1.0)] == [WITHOUT[0][0][0]]
    assert len(at(0.3, 1.0)) == 2
    assert len(at(0.3, 0.2)) == 3
    assert len(at(0.5, 0.5)) == 2
    assert at(0.3, 1.0, mask=torch.ones(64, 64)) == at(0.3, 1.0)
    assert [cond for cond, _ in at(0.0, 0.0, end=0.5)] == [cond for cond, _ in at(0.0, 0.0)]
    assert WHOLE[0][1].keys() == {"pooled_output", "guidance"}


def test_other_conds_are_left_alone(golden_model):
    other = text(7)
    bare = velocity_of(golden_model, X, SIGMA, other)
    together = velocity_of(golden_model, X, SIGMA, at(0.3, 1.4), other)
    assert near(together[:1], by_hand(golden_model, 0.3, 1.4))
    assert near(together[1:], bare)


def test_strengths_per_image_equal_single_runs(golden_model):
    values = (0.0, 0.5, 1.0, 1.6)
    together = velocity_of(golden_model, X.repeat(4, 1, 1, 1), SIGMA, at(values, 0.7))
    for k, value in enumerate(values):
        assert near(together[k : k + 1], by_hand(golden_model, value, 0.7))
    with pytest.raises(SliderError, match="4 strengths for a batch of 2"):
        velocity_of(golden_model, X.repeat(2, 1, 1, 1), SIGMA, at(values, 0.7))


def test_outside_the_mask_the_strengths_are_zero(golden_model):
    """The mask is as large as the picture, 8 pixels to one of the latent."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1.0
    mask[:, 32:, :32] = 0.5
    small = mask[0, 4::8, 4::8]
    found = velocity_of(golden_model, X, SIGMA, at(1.6, 1.0, mask=mask))
    assert near(found, by_hand(golden_model, 1.6 * small, small))
    nowhere = velocity_of(golden_model, X, SIGMA, at(1.6, 1.0, mask=torch.zeros(64, 64)))
    assert near(nowhere, by_hand(golden_model, 0.0, 0.0))
    values = (0.2, 1.6)
    each = velocity_of(golden_model, X.repeat(2, 1, 1, 1), SIGMA, at(values, 1.0, mask=torch.cat([mask, 1 - mask])))
    assert near(each[:1], by_hand(golden_model, 0.2 * small, small))
    assert near(each[1:], by_hand(golden_model, 1.6 * (1 - small), 1 - small))


def test_a_place_for_some_of_them(golden_model):
    """Mask and part hold for the second; the first has its strength everywhere and always."""
    small = torch.zeros(8, 8)
    small[:, :4] = 1.0
    mask = small.repeat_interleave(8, 0).repeat_interleave(8, 1)
    found = velocity_of(golden_model, X, SIGMA, at(0.4, 1.6, mask=mask, chosen=[2]))
    assert near(found, by_hand(golden_model, 0.4, 1.6 * small))
    everywhere = at(0.4, 1.6, mask=mask, chosen=[1, 2])
    assert near(velocity_of(golden_model, X, SIGMA, everywhere), by_hand(golden_model, 0.4 * small, 1.6 * small))
    assert len(at(1.0, 1.6, mask=mask, chosen=[2])) == 2
    late = golden_model.model.model_sampling.percent_to_sigma(0.9)
    early = at(0.4, 1.6, end=0.5, chosen=[2])
    for sigma, second in ((1.0, 1.6), (late, 0.0)):
        now = velocity_of(golden_model, X, sigma, early)
        assert near(now, velocity_of(golden_model, X, sigma, at(0.4, second)))
    assert len(at(0.4, 1.0, end=0.5, chosen=[1])) == 3
    with pytest.raises(SliderError, match=r"no instruction 3; expected numbers from 1 to 2: 1 = 'first'"):
        at(0.5, 1.0, mask=mask, chosen=[3])


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_before_and_after_its_part_the_strengths_are_zero(golden_model, start, end):
    """Single calls, borders included, and a run of 8 steps against one whose steps are switched by hand."""
    sampling = golden_model.model.model_sampling
    first, last = (torch.tensor(sampling.percent_to_sigma(p), dtype=torch.float32) for p in (start, end))
    values, soft = (1.6, 0.4), torch.full((1, 8, 8), 0.5)
    for place in ({}, {"mask": soft}):
        placed, inside, outside = at(*values, start=start, end=end, **place), at(*values, **place), at(0.0, 0.0)
        x, acted = X * 1.0, []
        sigmas = calculate_sigmas(sampling, "simple", 8)
        for now, then in pairwise(sigmas):
            acts = bool(last <= now <= first)
            acted.append(acts)
            want = velocity_of(golden_model, x, now.item(), inside if acts else outside)
            assert near(velocity_of(golden_model, x, now.item(), placed), want)
            x = x + (then - now) * want
        assert 0 < sum(acted) < 8
        for border in {start, end} - {0.0, 1.0}:
            sigma = torch.tensor(sampling.percent_to_sigma(border), dtype=torch.float32).item()
            assert near(velocity_of(golden_model, X, sigma, placed), velocity_of(golden_model, X, sigma, inside))
        found = comfy.sample.sample(
            golden_model, X, 8, 1.0, "euler", "simple", placed, placed, torch.zeros_like(X), disable_pbar=True
        )
        assert near(found, golden_model.model.process_latent_out(x))
        whole = comfy.sample.sample(
            golden_model, X, 8, 1.0, "euler", "simple", inside, inside, torch.zeros_like(X), disable_pbar=True
        )
        assert far(found, whole)


def test_refused():
    for strengths, message in {
        (0.5,): "2 instructions but only 1 strengths",
        (1.0, 1.0, 0.5): "strength_3 is 0.5, but there are only 2",
        ((0.1, 0.2), (0.1, 0.2, 0.3)): "differ in length",
        ("x", 1.0): "strength_1 is 'x'",
    }.items():
        with pytest.raises(SliderError, match=message):
            at(*strengths)
    for mask, message in (
        (torch.ones(3, 8, 8), "3 masks for 1 strength"),
        (torch.full((8, 8), torch.nan), "values from nan"),
        (torch.ones(8), r"the shape \(8,\)"),
    ):
        with pytest.raises(SliderError, match=message):
            at(0.5, 1.0, mask=mask)
    with pytest.raises(SliderError, match="expected 0 <= start < end <= 1"):
        at(0.5, 1.0, start=0.6, end=0.4)


def test_prompts_without_a_part():
    lines = "make it red", "add a hat and a scarf", "blur it"
    prompt, ranges = join_lines("\n".join(lines))
    found = [remove_instruction(prompt, part) for part in ranges]
    assert found == [" and ".join(lines[:k] + lines[k + 1 :]) for k in range(3)]
    prompt, [only] = join_lines("make it red")
    assert remove_instruction(prompt, only) == ""
    prompt, ranges = read_marks("A portrait of [[an old woman]] with [[golden hair]] and a hat")
    assert [remove_instruction(prompt, part) for part in ranges] == [
        "A portrait of  with golden hair and a hat",
        "A portrait of an old woman with a hat",
    ]


def difference(g: Graph, words: str, *strengths: object, mode: str = "one per line", **more: object) -> Link:
    values = {f"strength_{k}": value for k, value in enumerate(strengths, 1)}
    more = {"start": 0.0, "end": 1.0, **more}
    return g.add("EditSlidersPromptDifference", clip=g.clip(), text=words, mode=mode, pad_to_512=True, **values, **more)


def stock_average(g: Graph, **weights: float) -> Link:
    """Prompts averaged by ComfyUI's own nodes."""
    each = [
        g.add("ConditioningSetAreaStrength", conditioning=g.stock_text(words.replace("_", " ")), strength=weight)
        for words, weight in weights.items()
    ]
    return g.add("ConditioningCombine", conditioning_1=each[0], conditioning_2=each[1])


def test_whole_graphs(server):
    words = "make it red\nblur it"

    def made(conditioning) -> object:
        return lambda g: g.sample(g.model(), g.edited(conditioning(g)))

    def nowhere(g: Graph, words: str, **more: object) -> Link:
        return difference(g, words, mask=g.add("SolidMask", value=0.0, width=64, height=64), **more)

    one, bare, less, by_stock, marked, gone, lacking, masked, blank, early, some = latents(
        server,
        made(lambda g: difference(g, words)),
        made(lambda g: g.stock_text("make it red and blur it")),
        made(lambda g: difference(g, words, 0.3)),
        made(lambda g: stock_average(g, make_it_red_and_blur_it=0.3, blur_it=0.7)),
        made(lambda g: difference(g, "[[make it red]] and blur it", 0.3, mode="[[marked]] phrases")),
        made(lambda g: difference(g, words, 1.0, 0.0)),
        made(lambda g: g.stock_text("make it red")),
        made(lambda g: nowhere(g, "blur it")),
        made(lambda g: g.stock_text("")),
        made(lambda g: difference(g, words, end=0.4)),
        made(lambda g: nowhere(g, words, sub_instructions="2")),
    )
    assert (one == bare).all()
    assert near(less, by_stock)
    assert far(less, bare)
    assert near(marked, less)
    assert near(gone, lacking)
    assert far(gone, bare)
    assert near(masked, blank)
    assert near(some, lacking)
    assert far(early, one)
    assert far(early, blank)


def test_lists_in_graphs_and_bad_strengths(server):
    def swept(g: Graph) -> Link:
        strengths = g.add("EditSlidersStrengthRange", first=0.0, last=1.0, count=2)
        latent = g.add("EditSlidersLatentForSweep", latent=g.noise(), strengths=strengths)
        return g.sample(g.model(), g.edited(difference(g, "make it red\nblur it", strengths)), latent=latent)

    def still(words: str):
        return lambda g: g.sample(g.model(), g.edited(g.stock_text(words)))

    pictures, lacking, whole = latents(server, swept, still("blur it"), still("make it red and blur it"))
    assert near(pictures[:1], lacking)
    assert near(pictures[1:], whole)
    g = Graph()
    g.save(g.sample(g.model(), g.edited(difference(g, "make it red", "much"))))
    with pytest.raises(PromptRejected, match="strength_1 is 'much'"):
        server.run(g)
