"""Prompt Difference: velocities against the guidance formula, prompts with one instruction left out, and graphs."""

from __future__ import annotations

from itertools import pairwise

import comfy.sample
import pytest
import torch
from comfy.samplers import calculate_sigmas
from support.comfy_server import PromptRejected
from support.graphs import Graph, Link
from support.model_calls import noise, velocity_of
from support.outcomes import differ, latents, near

from slider_core import keys
from slider_core.conditioning.span_strengths import Span
from slider_core.errors import SliderError
from slider_core.text.instructions import join_lines, read_marks, remove_instruction
from slider_core.training_free.prompt_difference import PromptDifferences, PromptWeights

SIGMA, X = 0.7, noise(1, 16, 8, 8, seed=9)
SPANS = [Span("first", (2, 3)), Span("second", (4, 5))]


def text(seed: int) -> list:
    return [[noise(1, 24, 64, seed=seed), {"pooled_output": noise(1, 768, seed=seed + 1), "guidance": 3.5}]]


FULL, LEAVE_ONE_OUT = text(1), [text(3), text(5)]
DIFFERENCES = PromptDifferences("first and second", SPANS, FULL, LEAVE_ONE_OUT)


def with_strengths(*strengths: object, **region) -> list:
    return DIFFERENCES.with_strengths({f"strength_{k}": s for k, s in enumerate(strengths, 1)}, **region)


def expected_velocity(model, *strengths: object) -> torch.Tensor:
    """The guidance formula, one model call per prompt. strengths: numbers or maps of shape (8, 8)."""
    full = velocity_of(model, X, SIGMA, FULL)
    terms = [(s - 1) * (full - velocity_of(model, X, SIGMA, without)) for s, without in zip(strengths, LEAVE_ONE_OUT)]
    return full + sum(terms)


@pytest.mark.parametrize("strengths", [(0.3, 1.0), (1.6, 0.4), (0.0, 0.0), (-0.5, 2.0), (0.0, 1.0), (0.5, 0.5)])
def test_velocity_equals_the_formula(golden_model, strengths):
    assert near(
        velocity_of(golden_model, X, SIGMA, with_strengths(*strengths)), expected_velocity(golden_model, *strengths)
    )


def test_entries_of_weight_zero_are_left_out(golden_model):
    full = [[cond, {**options, keys.PROMPT_WEIGHTS: PromptWeights()}] for cond, options in FULL]
    assert with_strengths(1.0, 1.0) == full
    assert with_strengths((1.0, 1.0), 1.0) == full
    assert with_strengths(1.0, 1.0, mask=torch.ones(1, 64, 64)) == full
    assert [cond for cond, _ in with_strengths(0.0, 1.0)] == [LEAVE_ONE_OUT[0][0][0]]
    assert len(with_strengths(0.3, 1.0)) == 2
    assert len(with_strengths(0.3, 0.2)) == 3
    assert len(with_strengths(0.5, 0.5)) == 2
    assert with_strengths(0.3, 1.0, mask=torch.ones(64, 64)) == with_strengths(0.3, 1.0)
    assert [cond for cond, _ in with_strengths(0.0, 0.0, end=0.5)] == [cond for cond, _ in with_strengths(0.0, 0.0)]
    assert FULL[0][1].keys() == {"pooled_output", "guidance"}


def test_other_conds_are_unchanged(golden_model):
    other = text(7)
    bare = velocity_of(golden_model, X, SIGMA, other)
    together = velocity_of(golden_model, X, SIGMA, with_strengths(0.3, 1.4), other)
    assert near(together[:1], expected_velocity(golden_model, 0.3, 1.4))
    assert near(together[1:], bare)


def test_strengths_per_image_equal_single_runs(golden_model):
    values = (0.0, 0.5, 1.0, 1.6)
    together = velocity_of(golden_model, X.repeat(4, 1, 1, 1), SIGMA, with_strengths(values, 0.7))
    for k, value in enumerate(values):
        assert near(together[k : k + 1], expected_velocity(golden_model, value, 0.7))
    with pytest.raises(SliderError, match="4 strengths for a batch of 2"):
        velocity_of(golden_model, X.repeat(2, 1, 1, 1), SIGMA, with_strengths(values, 0.7))


def test_strengths_are_zero_outside_the_mask(golden_model):
    """The mask has the size of the image: 8 x 8 mask pixels per latent pixel."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1.0
    mask[:, 32:, :32] = 0.5
    latent_mask = mask[0, 4::8, 4::8]
    masked = velocity_of(golden_model, X, SIGMA, with_strengths(1.6, 1.0, mask=mask))
    assert near(masked, expected_velocity(golden_model, 1.6 * latent_mask, latent_mask))
    masked_out = velocity_of(golden_model, X, SIGMA, with_strengths(1.6, 1.0, mask=torch.zeros(64, 64)))
    assert near(masked_out, expected_velocity(golden_model, 0.0, 0.0))
    values = (0.2, 1.6)
    each = velocity_of(
        golden_model, X.repeat(2, 1, 1, 1), SIGMA, with_strengths(values, 1.0, mask=torch.cat([mask, 1 - mask]))
    )
    assert near(each[:1], expected_velocity(golden_model, 0.2 * latent_mask, latent_mask))
    assert near(each[1:], expected_velocity(golden_model, 1.6 * (1 - latent_mask), 1 - latent_mask))


def test_mask_and_schedule_of_selected_instructions(golden_model):
    """Mask and schedule range apply to the second instruction; the first keeps its strength at all pixels and steps."""
    latent_mask = torch.zeros(8, 8)
    latent_mask[:, :4] = 1.0
    mask = latent_mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    second_masked = velocity_of(golden_model, X, SIGMA, with_strengths(0.4, 1.6, mask=mask, chosen=[2]))
    assert near(second_masked, expected_velocity(golden_model, 0.4, 1.6 * latent_mask))
    both_masked = with_strengths(0.4, 1.6, mask=mask, chosen=[1, 2])
    assert near(
        velocity_of(golden_model, X, SIGMA, both_masked),
        expected_velocity(golden_model, 0.4 * latent_mask, 1.6 * latent_mask),
    )
    assert len(with_strengths(1.0, 1.6, mask=mask, chosen=[2])) == 2
    late_sigma = golden_model.model.model_sampling.percent_to_sigma(0.9)
    first_half = with_strengths(0.4, 1.6, end=0.5, chosen=[2])
    for sigma, second in ((1.0, 1.6), (late_sigma, 0.0)):
        ranged = velocity_of(golden_model, X, sigma, first_half)
        assert near(ranged, velocity_of(golden_model, X, sigma, with_strengths(0.4, second)))
    assert len(with_strengths(0.4, 1.0, end=0.5, chosen=[1])) == 3
    with pytest.raises(SliderError, match=r"no instruction 3; expected numbers from 1 to 2: 1 = 'first'"):
        with_strengths(0.5, 1.0, mask=mask, chosen=[3])


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_strengths_are_zero_outside_the_schedule_range(golden_model, start, end):
    """Single calls, also at the ends of the range, and 8 sampling steps against Euler steps that switch strengths."""
    sampling = golden_model.model.model_sampling
    first, last = (torch.tensor(sampling.percent_to_sigma(p), dtype=torch.float32) for p in (start, end))
    values = (1.6, 0.4)
    for region in ({}, {"mask": torch.full((1, 8, 8), 0.5)}):
        ranged = with_strengths(*values, start=start, end=end, **region)
        inside, outside = with_strengths(*values, **region), with_strengths(0.0, 0.0)
        x, steps_in_range = X * 1.0, []
        sigmas = calculate_sigmas(sampling, "simple", 8)
        for sigma, next_sigma in pairwise(sigmas):
            in_range = bool(last <= sigma <= first)
            steps_in_range.append(in_range)
            expected = velocity_of(golden_model, x, sigma.item(), inside if in_range else outside)
            assert near(velocity_of(golden_model, x, sigma.item(), ranged), expected)
            x = x + (next_sigma - sigma) * expected
        assert 0 < sum(steps_in_range) < 8
        for percent in {start, end} - {0.0, 1.0}:
            sigma = torch.tensor(sampling.percent_to_sigma(percent), dtype=torch.float32).item()
            assert near(velocity_of(golden_model, X, sigma, ranged), velocity_of(golden_model, X, sigma, inside))
        sampled = comfy.sample.sample(
            golden_model, X, 8, 1.0, "euler", "simple", ranged, ranged, torch.zeros_like(X), disable_pbar=True
        )
        assert near(sampled, golden_model.model.process_latent_out(x))
        unlimited = comfy.sample.sample(
            golden_model, X, 8, 1.0, "euler", "simple", inside, inside, torch.zeros_like(X), disable_pbar=True
        )
        assert differ(sampled, unlimited)


def test_invalid_arguments():
    for strengths, message in {
        (0.5,): "2 instructions but only 1 strengths",
        (1.0, 1.0, 0.5): "strength_3 is 0.5, but there are only 2",
        ((0.1, 0.2), (0.1, 0.2, 0.3)): "differ in length",
        ("x", 1.0): "strength_1 is 'x'",
    }.items():
        with pytest.raises(SliderError, match=message):
            with_strengths(*strengths)
    for mask, message in (
        (torch.ones(3, 8, 8), "3 masks for 1 strength"),
        (torch.full((8, 8), torch.nan), "values from nan"),
        (torch.ones(8), r"the shape \(8,\)"),
    ):
        with pytest.raises(SliderError, match=message):
            with_strengths(0.5, 1.0, mask=mask)
    with pytest.raises(SliderError, match="expected 0 <= start < end <= 1"):
        with_strengths(0.5, 1.0, start=0.6, end=0.4)


def test_prompts_with_one_instruction_removed():
    lines = "make it red", "add a hat and a scarf", "blur it"
    prompt, ranges = join_lines("\n".join(lines))
    prompts = [remove_instruction(prompt, r) for r in ranges]
    assert prompts == [" and ".join(lines[:k] + lines[k + 1 :]) for k in range(3)]
    prompt, [only] = join_lines("make it red")
    assert remove_instruction(prompt, only) == ""
    prompt, ranges = read_marks("A portrait of [[an old woman]] with [[golden hair]] and a hat")
    assert [remove_instruction(prompt, r) for r in ranges] == [
        "A portrait of  with golden hair and a hat",
        "A portrait of an old woman with a hat",
    ]


def difference(g: Graph, text: str, *strengths: object, mode: str = "one per line", **more: object) -> Link:
    values = {f"strength_{k}": value for k, value in enumerate(strengths, 1)}
    more = {"start": 0.0, "end": 1.0, **more}
    return g.add("EditSlidersPromptDifference", clip=g.clip(), text=text, mode=mode, pad_to_512=True, **values, **more)


def stock_average(g: Graph, **weights: float) -> Link:
    """The average of two prompts (prompt, spaces as underscores -> weight) by ComfyUI's own nodes."""
    first, second = (
        g.add("ConditioningSetAreaStrength", conditioning=g.stock_text(prompt.replace("_", " ")), strength=weight)
        for prompt, weight in weights.items()
    )
    return g.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)


def test_graphs(server):
    instructions = "make it red\nblur it"

    def sample(conditioning) -> object:
        return lambda g: g.sample(g.model(), g.edited(conditioning(g)))

    def masked_out(g: Graph, text: str, **more: object) -> Link:
        return difference(g, text, mask=g.add("SolidMask", value=0.0, width=64, height=64), **more)

    one, bare, weak, averaged, marked, zero, without, masked, empty, early, selected = latents(
        server,
        sample(lambda g: difference(g, instructions)),
        sample(lambda g: g.stock_text("make it red and blur it")),
        sample(lambda g: difference(g, instructions, 0.3)),
        sample(lambda g: stock_average(g, make_it_red_and_blur_it=0.3, blur_it=0.7)),
        sample(lambda g: difference(g, "[[make it red]] and blur it", 0.3, mode="[[marked]] phrases")),
        sample(lambda g: difference(g, instructions, 1.0, 0.0)),
        sample(lambda g: g.stock_text("make it red")),
        sample(lambda g: masked_out(g, "blur it")),
        sample(lambda g: g.stock_text("")),
        sample(lambda g: difference(g, instructions, end=0.4)),
        sample(lambda g: masked_out(g, instructions, sub_instructions="2")),
    )
    assert (one == bare).all()
    assert near(weak, averaged)
    assert differ(weak, bare)
    assert near(marked, weak)
    assert near(zero, without)
    assert differ(zero, bare)
    assert near(masked, empty)
    assert near(selected, without)
    assert differ(early, one)
    assert differ(early, empty)


def test_strength_lists_and_invalid_strengths_in_graphs(server):
    def swept(g: Graph) -> Link:
        strengths = g.add("EditSlidersStrengthRange", first=0.0, last=1.0, count=2)
        latent = g.add("EditSlidersLatentForSweep", latent=g.noise(), strengths=strengths)
        return g.sample(g.model(), g.edited(difference(g, "make it red\nblur it", strengths)), latent=latent)

    def single(prompt: str):
        return lambda g: g.sample(g.model(), g.edited(g.stock_text(prompt)))

    images, without, full = latents(server, swept, single("blur it"), single("make it red and blur it"))
    assert near(images[:1], without)
    assert near(images[1:], full)
    g = Graph()
    g.save(g.sample(g.model(), g.edited(difference(g, "make it red", "much"))))
    with pytest.raises(PromptRejected, match="strength_1 is 'much'"):
        server.run(g)
