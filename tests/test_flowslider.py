"""FlowSlider: the published steps, conditionings and models it works with, its node, and errors."""

from __future__ import annotations

import comfy.sample
import numpy as np
import pytest
import torch
from support.comfy_server import PromptRejected
from support.graphs import Graph, Link
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import differ, latents, near
from support.stable_flow import LATENT, edit_text, photo, sigmas_of, source_text

from slider_core.errors import SliderError
from slider_core.sampling.flow_matching import scheduler_sigmas
from slider_core.training_free.flowslider import sample_flowslider
from slider_core.training_free.velocity_blending import blend_velocity

STEPS, SEED = 3, 5
SOURCE, TARGET = source_text(guidance=1.5), edit_text(1, guidance=5.5)


def noise_of(seed: int = SEED, images: int = 1) -> torch.Tensor:
    return comfy.sample.prepare_noise(torch.zeros(images, *LATENT[1:]), seed)


def edit_source(model, strength: tuple[float, ...] = (0.6,), source=SOURCE, target=TARGET, start=0.0, **more):
    sigmas = scheduler_sigmas(model, "simple", STEPS, start)
    arguments = {"latent": photo(model), "noise": noise_of(), **more}
    return sample_flowslider(model, source, target, strength=strength, sigmas=sigmas, **arguments)


def reference_edit(
    model,
    strength: float,
    source=SOURCE,
    target=TARGET,
    first: int = 0,
    mask=1.0,
    latent=None,
    from_noise=None,
    num_steered=9,
) -> torch.Tensor:
    """The published steps written out, from step `first`; only steps before `num_steered` steer."""
    x_src = model.model.latent_format.process_in(photo(model) if latent is None else latent)
    n = noise_of() if from_noise is None else from_noise
    z, sigmas = x_src, sigmas_of(model, STEPS)
    for k in range(first, STEPS):
        sigma = sigmas[k].item()
        z_src = (1 - sigma) * x_src + sigma * n
        z_tar = z + z_src - x_src
        fidelity = velocity_of(model, z_tar, sigma, source) - velocity_of(model, z_src, sigma, source)
        steering = velocity_of(model, z_tar, sigma, target) - velocity_of(model, z_tar, sigma, source)
        z = z + (sigmas[k + 1] - sigmas[k]) * (fidelity + (strength if k < num_steered else 0) * steering) * mask
    return model.model.latent_format.process_out(z)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0, 1.7, -0.5])
def test_edit_equals_the_published_steps(golden_model, strength):
    result = edit_source(golden_model, (strength,))
    assert near(result, reference_edit(golden_model, strength))
    assert near(result, photo(golden_model)) == (strength == 0)


def test_equal_prompts_keep_the_source(golden_model):
    assert near(edit_source(golden_model, (1.7,), target=SOURCE), photo(golden_model))


def test_start(golden_model):
    result = edit_source(golden_model, start=0.3)
    assert near(result, reference_edit(golden_model, 0.6, first=1))
    assert differ(result, edit_source(golden_model))


@pytest.mark.parametrize(("end", "num_steered"), [(0.1, 1), (0.5, 2), (1.0, 3)])
def test_end(golden_model, end, num_steered):
    """The three steps start at fractions 0, 1/3 and 2/3 of the schedule."""
    assert near(edit_source(golden_model, end=end), reference_edit(golden_model, 0.6, num_steered=num_steered))
    calls: list[int] = []
    counted = golden_model.clone()
    counted.set_model_unet_function_wrapper(
        lambda apply, args: (calls.append(len(args["input"])), apply(args["input"], args["timestep"], **args["c"]))[1]
    )
    edit_source(counted, end=end)
    assert sum(calls) == 2 * STEPS + num_steered
    if num_steered < STEPS:
        assert differ(edit_source(golden_model, end=end), edit_source(golden_model))


def test_empty_schedule_range_is_rejected(golden_model):
    with pytest.raises(SliderError, match="expected 0 <= start < end <= 1"):
        edit_source(golden_model, end=0.0)


def test_noise_mask_keeps_the_source_outside(golden_model):
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1.0
    result = edit_source(golden_model, mask=mask)
    assert near(result, reference_edit(golden_model, 0.6, mask=mask[:, 4::8, 4::8]))
    assert near(result[..., 4:], photo(golden_model)[..., 4:])
    assert differ(result[..., :4], photo(golden_model)[..., :4])


def test_prompts_with_references_masks_and_different_lengths(golden_model):
    """Two masked cond entries with a reference latent; their lengths differ, so they cannot be batched."""
    reference = {"reference_latents": [photo(golden_model)], "reference_latents_method": "offset"}
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1.0
    source = source_text(**reference)
    target = [*edit_text(1, **reference, mask=left), *edit_text(2, num_tokens=17, **reference, mask=1 - left)]
    result = edit_source(golden_model, source=source, target=target)
    assert near(result, reference_edit(golden_model, 0.6, source, target))
    assert differ(result, edit_source(golden_model))
    assert differ(result, edit_source(golden_model, source=source, target=target[:1]))


def test_patched_models(golden_model):
    """A patch that changes the prediction takes effect; at strength 1 it has none. torch.compile works."""
    full, half = (blend_velocity(golden_model, -photo(golden_model), (s,)) for s in (1.0, 0.5))
    unpatched = edit_source(golden_model)
    assert near(edit_source(full), unpatched)
    assert differ(edit_source(half), unpatched)
    torch._dynamo.reset()
    assert near(edit_source(compiled(golden_model)), unpatched)


def test_velocity_blending_scales_the_steering(golden_model):
    """The source velocity is the same for both prompts, so blending at 0.5 halves the steering."""
    half = blend_velocity(golden_model, -photo(golden_model), (0.5,))
    sigmas = scheduler_sigmas(golden_model, "simple", 1)
    result = sample_flowslider(half, SOURCE, TARGET, photo(golden_model), noise_of(), (0.6,), sigmas)
    full = sample_flowslider(golden_model, SOURCE, TARGET, photo(golden_model), noise_of(), (0.3,), sigmas)
    assert near(result, full)


def test_strength_list_equals_single_runs(golden_model):
    values = (0.0, 0.6, 1.0, -0.5)
    together = edit_source(golden_model, values)
    for k, value in enumerate(values):
        assert near(together[k : k + 1], edit_source(golden_model, (value,)))


def test_source_batch_with_noise_and_strength_per_image(golden_model):
    sources = torch.cat([photo(golden_model), golden_model.model.latent_format.process_out(noise(*LATENT, seed=8))])
    noise_batch = noise_of(images=2)
    for strengths in ((0.6,), (0.6, 1.7)):
        result = edit_source(golden_model, strengths, latent=sources, noise=noise_batch)
        for k in range(2):
            expected = reference_edit(
                golden_model, strengths[-1 if k else 0], latent=sources[k : k + 1], from_noise=noise_batch[k : k + 1]
            )
            assert near(result[k : k + 1], expected)


def test_model_is_unchanged_after_runs_and_interruptions(golden_model):
    def bare() -> torch.Tensor:
        return velocity_of(golden_model, noise_of(), 0.7, TARGET)

    before, options = bare(), {"transformer_options": {}}
    first = edit_source(golden_model)
    assert torch.equal(bare(), before)
    assert golden_model.model_options == options

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_source(golden_model, (1.7,), on_step=interrupt)
    assert torch.equal(bare(), before)
    assert golden_model.model_options == options
    assert torch.equal(edit_source(golden_model), first)


def test_progress(golden_model):
    """on_step gets the prediction of the final latent; after the last step it equals the result."""
    calls = []
    result = edit_source(golden_model, on_step=lambda *args: calls.append(args))
    assert [(step, steps) for step, _, _, steps in calls] == [(k, STEPS) for k in range(STEPS)]
    expected, latent = (golden_model.model.latent_format.process_out(x) for x in calls[-1][1:3])
    assert near(expected, result)
    assert near(latent, result)
    assert differ(calls[0][1], calls[0][2])


def test_errors(golden_model):
    def error(**more) -> str:
        with pytest.raises(SliderError) as caught:
            edit_source(golden_model, **more)
        return str(caught.value)

    sources = photo(golden_model).repeat(3, 1, 1, 1)
    assert "2 strengths for a batch of 3" in error(strength=(0.1, 0.2), latent=sources, noise=noise_of(images=3))
    assert "is empty" in error(latent=torch.zeros(LATENT))
    assert "expected an image with 16 channels" in error(latent=sources[:, :4])
    assert "With start 1, none of the 3 step(s) of 'simple' are left" in error(start=1.0)


def flowslider(
    g: Graph, strength: object = 0.6, target: str = "make it red", latent: Link | None = None, **more
) -> Link:
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


def sweep(g: Graph) -> Link:
    return flowslider(g, g.add("EditSlidersStrengthRange", first=0.0, last=1.2, count=3))


def masked_out(g: Graph) -> Link:
    mask = g.add("SolidMask", value=0.0, width=64, height=64)
    return flowslider(g, latent=g.add("SetLatentNoiseMask", samples=g.photo(), mask=mask))


def rendered(g: Graph) -> Link:
    return g.sample(g.model(), g.edited(g.stock_text("make it red")))


def test_graphs(server):
    before, source, half, same, swept_latents, masked, other_seed, lora, later, shorter = latents(
        server,
        rendered,
        lambda g: g.photo(),
        flowslider,
        lambda g: flowslider(g, target="keep the image the same"),
        sweep,
        masked_out,
        lambda g: flowslider(g, seed=8),
        lambda g: flowslider(g, model=g.lora(g.model())),
        lambda g: flowslider(g, start=0.5),
        lambda g: flowslider(g, end=0.3),
    )
    assert near(same, source)
    assert near(masked, source)
    assert near(swept_latents[:1], source)
    assert near(swept_latents[1:2], half)
    for different in (source, other_seed, lora, later, shorter):
        assert differ(half, different)
    server.free()
    after, again = latents(server, rendered, lambda g: flowslider(g, seed=7, steps=2))
    assert np.array_equal(after, before)
    assert near(again, half)


def test_invalid_strength_is_rejected(server):
    graph = Graph()
    graph.save(flowslider(graph, "much"))
    with pytest.raises(PromptRejected, match="strength is 'much'"):
        server.run(graph)
