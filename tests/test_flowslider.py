"""Edits that start from the source: what is computed, for which conditionings and models, and what is refused."""

from __future__ import annotations

import comfy.sample
import numpy as np
import pytest
import torch
from support.comfy_server import PromptRejected
from support.graphs import Graph, Link
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import far, latents, near
from support.stable_flow import LATENT, edit_text, photo, sigmas_of, source_text

from slider_core.errors import SliderError
from slider_core.sampling.flow_matching import scheduler_sigmas
from slider_core.training_free.flowslider import sample_flowslider
from slider_core.training_free.velocity_blending import blend_velocity

STEPS, SEED = 3, 5
SOURCE, TARGET = source_text(guidance=1.5), edit_text(1, guidance=5.5)


def noise_of(seed: int = SEED, images: int = 1) -> torch.Tensor:
    return comfy.sample.prepare_noise(torch.zeros(images, *LATENT[1:]), seed)


def steered(model, strength: tuple[float, ...] = (0.6,), source=SOURCE, target=TARGET, start=0.0, **more):
    sigmas = scheduler_sigmas(model, "simple", STEPS, start)
    arguments = {"latent": photo(model), "noise": noise_of(), **more}
    return sample_flowslider(model, source, target, strength=strength, sigmas=sigmas, **arguments)


def by_hand(
    model, strength: float, source=SOURCE, target=TARGET, first: int = 0, mask=1.0, latent=None, from_noise=None, acts=9
) -> torch.Tensor:
    """The published steps, one velocity at a time; they begin with step `first`, and steer in the first `acts`."""
    x_src = model.model.latent_format.process_in(photo(model) if latent is None else latent)
    n = noise_of() if from_noise is None else from_noise
    z, sigmas = x_src, sigmas_of(model, STEPS)
    for k in range(first, STEPS):
        sigma = sigmas[k].item()
        z_src = (1 - sigma) * x_src + sigma * n
        z_tar = z + z_src - x_src
        fidelity = velocity_of(model, z_tar, sigma, source) - velocity_of(model, z_src, sigma, source)
        steering = velocity_of(model, z_tar, sigma, target) - velocity_of(model, z_tar, sigma, source)
        z = z + (sigmas[k + 1] - sigmas[k]) * (fidelity + (strength if k < acts else 0) * steering) * mask
    return model.model.latent_format.process_out(z)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0, 1.7, -0.5])
def test_it_equals_the_steps_written_out(golden_model, strength):
    found = steered(golden_model, (strength,))
    assert near(found, by_hand(golden_model, strength))
    assert near(found, photo(golden_model)) == (strength == 0)


def test_one_prompt_for_both_keeps_the_source(golden_model):
    assert near(steered(golden_model, (1.7,), target=SOURCE), photo(golden_model))


def test_it_begins_later_in_the_schedule(golden_model):
    found = steered(golden_model, start=0.3)
    assert near(found, by_hand(golden_model, 0.6, first=1))
    assert far(found, steered(golden_model))


@pytest.mark.parametrize(("end", "acts"), [(0.1, 1), (0.5, 2), (1.0, 3)])
def test_it_stops_to_steer(golden_model, end, acts):
    """The three steps begin at shares 0, 1/3 and 2/3 of the schedule."""
    assert near(steered(golden_model, end=end), by_hand(golden_model, 0.6, acts=acts))
    calls: list[int] = []
    counted = golden_model.clone()
    counted.set_model_unet_function_wrapper(
        lambda apply, args: (calls.append(len(args["input"])), apply(args["input"], args["timestep"], **args["c"]))[1]
    )
    steered(counted, end=end)
    assert sum(calls) == 2 * STEPS + acts
    if acts < STEPS:
        assert far(steered(golden_model, end=end), steered(golden_model))


def test_a_part_that_is_none(golden_model):
    with pytest.raises(SliderError, match="expected 0 <= start < end <= 1"):
        steered(golden_model, end=0.0)


def test_the_noise_mask_keeps_the_source(golden_model):
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1.0
    found = steered(golden_model, mask=mask)
    assert near(found, by_hand(golden_model, 0.6, mask=mask[:, 4::8, 4::8]))
    assert near(found[..., 4:], photo(golden_model)[..., 4:])
    assert far(found[..., :4], photo(golden_model)[..., :4])


def test_prompts_with_references_masks_and_other_lengths(golden_model):
    """An edit in the left half by a second entry, beside a reference; prompts that cannot share a call."""
    reference = {"reference_latents": [photo(golden_model)], "reference_latents_method": "offset"}
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1.0
    source = source_text(**reference)
    target = [*edit_text(1, **reference, mask=left), *edit_text(2, num_tokens=17, **reference, mask=1 - left)]
    found = steered(golden_model, source=source, target=target)
    assert near(found, by_hand(golden_model, 0.6, source, target))
    assert far(found, steered(golden_model))
    assert far(found, steered(golden_model, source=source, target=target[:1]))


def test_patched_models(golden_model):
    """What changes the predicted picture counts; with a strength of 1 it changes nothing. torch.compile fits."""
    one, half = (blend_velocity(golden_model, -photo(golden_model), (s,)) for s in (1.0, 0.5))
    whole = steered(golden_model)
    assert near(steered(one), whole)
    assert far(steered(half), whole)
    torch._dynamo.reset()
    assert near(steered(compiled(golden_model)), whole)


def test_a_blended_model_moves_by_its_own_velocities(golden_model):
    """What leads back to the blended source is the same for both prompts: half of the steering is left."""
    half = blend_velocity(golden_model, -photo(golden_model), (0.5,))
    sigmas = scheduler_sigmas(golden_model, "simple", 1)
    found = sample_flowslider(half, SOURCE, TARGET, photo(golden_model), noise_of(), (0.6,), sigmas)
    full = sample_flowslider(golden_model, SOURCE, TARGET, photo(golden_model), noise_of(), (0.3,), sigmas)
    assert near(found, full)


def test_a_list_of_strengths_equals_single_runs(golden_model):
    values = (0.0, 0.6, 1.0, -0.5)
    together = steered(golden_model, values)
    for k, value in enumerate(values):
        assert near(together[k : k + 1], steered(golden_model, (value,)))


def test_a_batch_of_sources_with_noise_and_strength_each(golden_model):
    sources = torch.cat([photo(golden_model), golden_model.model.latent_format.process_out(noise(*LATENT, seed=8))])
    noises = noise_of(images=2)
    for strengths in ((0.6,), (0.6, 1.7)):
        found = steered(golden_model, strengths, latent=sources, noise=noises)
        for k in range(2):
            one = by_hand(
                golden_model, strengths[-1 if k else 0], latent=sources[k : k + 1], from_noise=noises[k : k + 1]
            )
            assert near(found[k : k + 1], one)


def test_nothing_leaks(golden_model):
    def bare() -> torch.Tensor:
        return velocity_of(golden_model, noise_of(), 0.7, TARGET)

    before, options = bare(), {"transformer_options": {}}
    first = steered(golden_model)
    assert torch.equal(bare(), before)
    assert golden_model.model_options == options

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steered(golden_model, (1.7,), on_step=interrupt)
    assert torch.equal(bare(), before)
    assert golden_model.model_options == options
    assert torch.equal(steered(golden_model), first)


def test_progress(golden_model):
    """The expected picture of a step is where the last step would lead from there."""
    seen = []
    found = steered(golden_model, on_step=lambda *what: seen.append(what))
    assert [(step, steps) for step, _, _, steps in seen] == [(k, STEPS) for k in range(STEPS)]
    expected, latent = (golden_model.model.latent_format.process_out(one) for one in seen[-1][1:3])
    assert near(expected, found)
    assert near(latent, found)
    assert far(seen[0][1], seen[0][2])


def test_refused(golden_model):
    def error(**more) -> str:
        with pytest.raises(SliderError) as caught:
            steered(golden_model, **more)
        return str(caught.value)

    sources = photo(golden_model).repeat(3, 1, 1, 1)
    assert "2 strengths for a batch of 3" in error(strength=(0.1, 0.2), latent=sources, noise=noise_of(images=3))
    assert "is empty" in error(latent=torch.zeros(LATENT))
    assert "expected an image with 16 channels" in error(latent=sources[:, :4])
    assert "With start 1, none of the 3 step(s) of 'simple' are left" in error(start=1.0)


def edit(g: Graph, strength: object = 0.6, target: str = "make it red", latent: Link | None = None, **more) -> Link:
    settings = {"seed": 7, "steps": 2, "scheduler": "simple", "start": 0.0, "end": 1.0, **more}
    source = g.edited(g.stock_text("keep the image the same"))
    return g.add(
        "EditSlidersFidelitySteering",
        model=settings.pop("model", None) or g.model(),
        source=source,
        target=g.edited(g.stock_text(target)),
        latent=latent or g.photo(),
        strength=strength,
        **settings,
    )


def swept(g: Graph) -> Link:
    return edit(g, g.add("EditSlidersStrengthRange", first=0.0, last=1.2, count=3))


def masked_out(g: Graph) -> Link:
    mask = g.add("SolidMask", value=0.0, width=64, height=64)
    return edit(g, latent=g.add("SetLatentNoiseMask", samples=g.photo(), mask=mask))


def rendered(g: Graph) -> Link:
    return g.sample(g.model(), g.edited(g.stock_text("make it red")))


def test_whole_graphs(server):
    before, source, half, same, pictures, masked, seeded, lora, later, shorter = latents(
        server,
        rendered,
        lambda g: g.photo(),
        edit,
        lambda g: edit(g, target="keep the image the same"),
        swept,
        masked_out,
        lambda g: edit(g, seed=8),
        lambda g: edit(g, model=g.lora(g.model())),
        lambda g: edit(g, start=0.5),
        lambda g: edit(g, end=0.3),
    )
    assert near(same, source)
    assert near(masked, source)
    assert near(pictures[:1], source)
    assert near(pictures[1:2], half)
    for other in (source, seeded, lora, later, shorter):
        assert far(half, other)
    server.free()
    after, again = latents(server, rendered, lambda g: edit(g, seed=7, steps=2))
    assert np.array_equal(after, before)
    assert near(again, half)


def test_a_wrong_strength_is_named(server):
    graph = Graph()
    graph.save(edit(graph, "much"))
    with pytest.raises(PromptRejected, match="strength is 'much'"):
        server.run(graph)
