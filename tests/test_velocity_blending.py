"""Velocity blending: equality with its formula, mask, schedule range, threshold, refusals, and graphs."""

from __future__ import annotations

import comfy.sample
import numpy as np
import pytest
import torch
from support.graphs import Graph, Link
from support.model_calls import velocity_of
from support.outcomes import differ, latents, near
from support.stable_flow import LATENT, edit_text, photo, sigmas_of, source_text

from slider_core.conditioning.active_region import ActiveRegion
from slider_core.errors import SliderError
from slider_core.training_free.velocity_blending import blend_velocity

STEPS, SEED = 4, 5
POSITIVE, NEGATIVE = edit_text(1), source_text()


def sampled(model, cfg: float = 1.0, images: int = 1) -> torch.Tensor:
    noise = comfy.sample.prepare_noise(torch.zeros(LATENT), SEED).repeat(images, 1, 1, 1)
    empty = torch.zeros_like(noise)
    return comfy.sample.sample(
        model, noise, STEPS, cfg, "euler", "simple", POSITIVE, NEGATIVE, empty, disable_pbar=True
    )


def expected_latent(
    model, strength, cfg: float = 1.0, threshold: float = 0.0, steps: range = range(STEPS)
) -> torch.Tensor:
    """The latent after VeloEdit's Euler steps. strength: a number or a map of shape (8, 8)."""
    z, sigmas = comfy.sample.prepare_noise(torch.zeros(LATENT), SEED), sigmas_of(model, STEPS)
    source = model.model.latent_format.process_in(photo(model))
    for k in range(STEPS):
        sigma = sigmas[k].item()
        edit = velocity_of(model, z, sigma, POSITIVE)
        if cfg != 1:
            negative = velocity_of(model, z, sigma, NEGATIVE)
            edit = negative + cfg * (edit - negative)
        keep = (z - source) / sigma
        differs = sigma * abs(edit - keep).mean(1, keepdim=True) >= threshold
        blended = keep + strength * (edit - keep) * differs
        z = z + (sigmas[k + 1] - sigmas[k]) * (blended if k in steps else edit)
    return model.model.latent_format.process_out(z)


@pytest.mark.parametrize(("strength", "cfg"), [(0.0, 1.0), (0.3, 1.0), (1.6, 1.0), (-0.4, 1.0), (0.3, 2.5)])
def test_sampling_equals_the_formula(golden_model, strength, cfg):
    sampled_latent = sampled(blend_velocity(golden_model, photo(golden_model), (strength,)), cfg)
    assert near(sampled_latent, expected_latent(golden_model, strength, cfg))
    assert near(sampled_latent, photo(golden_model)) == (strength == 0)


def test_strength_one_equals_the_bare_model_and_the_model_stays_unpatched(golden_model):
    bare = sampled(golden_model)
    half, one = (blend_velocity(golden_model, photo(golden_model), (s,)) for s in (0.5, 1.0))
    first = sampled(half)
    assert torch.equal(sampled(one), bare)
    assert torch.equal(sampled(golden_model), bare)
    assert torch.equal(sampled(half), first)
    assert differ(first, bare)


def test_strengths_per_image_equal_single_runs(golden_model):
    values = (0.0, 0.5, 1.0, 1.6)
    together = sampled(blend_velocity(golden_model, photo(golden_model), values), images=len(values))
    for k, value in enumerate(values):
        alone = sampled(blend_velocity(golden_model, photo(golden_model), (value,)))
        assert near(together[k : k + 1], alone)


def test_sources_per_image(golden_model):
    sources = torch.cat([photo(golden_model), -photo(golden_model)])
    assert near(sampled(blend_velocity(golden_model, sources, (0.0,)), images=2), sources)


def test_the_source_is_kept_outside_the_mask(golden_model):
    """The mask has the size of the image: 8 x 8 mask pixels per latent pixel."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1.0
    mask[:, 32:, :32] = 0.5
    latent_mask = mask[0, 4::8, 4::8]
    sampled_latent = sampled(blend_velocity(golden_model, photo(golden_model), (0.8,), region=ActiveRegion(mask)))
    assert near(sampled_latent, expected_latent(golden_model, 0.8 * latent_mask))
    assert near(sampled_latent[..., 4:], photo(golden_model)[..., 4:])
    assert differ(sampled_latent[..., :4], photo(golden_model)[..., :4])
    unmasked, full_mask = (
        sampled(blend_velocity(golden_model, photo(golden_model), (0.8,), region=ActiveRegion(mask)))
        for mask in (None, torch.ones(64, 64))
    )
    assert torch.equal(unmasked, full_mask)


def test_the_source_is_kept_below_the_difference_threshold(golden_model):
    source = golden_model.model.latent_format.process_in(photo(golden_model))
    differences = abs(golden_model.model.latent_format.process_in(sampled(golden_model)) - source).mean(1)
    threshold = differences.median().item()
    for strength in (1.0, 0.5):
        sampled_latent = sampled(
            blend_velocity(golden_model, photo(golden_model), (strength,), difference_threshold=threshold)
        )
        assert near(sampled_latent, expected_latent(golden_model, strength, threshold=threshold))
        kept = abs(sampled_latent - photo(golden_model)).amax(1) < 1e-4
        assert 0 < kept.sum() < kept.numel()


def test_schedule_range(golden_model):
    sampling = golden_model.get_model_object("model_sampling")
    sigmas = sigmas_of(golden_model, STEPS).tolist()
    start, end = 0.2, 0.7
    inside = [
        k for k in range(STEPS) if sampling.percent_to_sigma(end) <= sigmas[k] <= sampling.percent_to_sigma(start)
    ]
    assert 0 < len(inside) < STEPS
    sampled_latent = sampled(
        blend_velocity(golden_model, photo(golden_model), (0.3,), region=ActiveRegion(None, start, end))
    )
    assert near(sampled_latent, expected_latent(golden_model, 0.3, steps=range(inside[0], inside[-1] + 1)))


def test_invalid_arguments(golden_model):
    def error(source: torch.Tensor, strength=(0.5,), images: int = 1, **more) -> str:
        with pytest.raises(SliderError) as caught:
            sampled(blend_velocity(golden_model, source, strength, **more), images=images)
        return str(caught.value)

    source = photo(golden_model)
    assert "16 x 8 x 6, but the sampled latent is 16 x 8 x 8" in error(source[..., :6])
    assert "16 x 8 x 6" in error(source[..., :6], (1.0,))
    assert "2 source latents for a batch of 3" in error(source.repeat(2, 1, 1, 1), images=3)
    assert "2 strengths for a batch of 1" in error(source, (0.1, 0.2))
    assert "empty" in error(torch.zeros_like(source))
    with pytest.raises(SliderError, match=r"start is 0\.5 and end is 0\.2; expected 0 <= start < end <= 1"):
        ActiveRegion(None, 0.5, 0.2)


def blended(g: Graph, strength: object, **more: object) -> Link:
    settings = {"keep_below": 0.0, "start": 0.0, "end": 1.0, **more}
    return g.add("EditSlidersVelocityBlending", model=g.model(), latent=g.photo(), strength=strength, **settings)


def rendered(g: Graph, model: Link, **more: object) -> Link:
    return g.sample(model, g.edited(g.stock_text("make it red")), **more)


def swept(g: Graph) -> Link:
    strengths = g.add("EditSlidersStrengthRange", first=0.0, last=1.0, count=2)
    latent = g.add("EditSlidersLatentForSweep", latent=g.noise(), strengths=strengths)
    return rendered(g, blended(g, strengths), latent=latent)


def masked_out(g: Graph) -> Link:
    return rendered(g, blended(g, 1.0, mask=g.add("SolidMask", value=0.0, width=64, height=64)))


def test_graphs(server):
    bare, source, one, half, images, masked = latents(
        server,
        lambda g: rendered(g, g.model()),
        lambda g: g.photo(),
        lambda g: rendered(g, blended(g, 1.0)),
        lambda g: rendered(g, blended(g, 0.5)),
        swept,
        masked_out,
    )
    assert np.array_equal(one, bare)
    assert differ(half, bare)
    assert differ(half, source)
    assert near(images[:1], source)
    assert near(images[1:], bare)
    assert near(masked, source)
