"""Batches that the model computes a few images at a time, and grids of strengths, which make them long."""

from __future__ import annotations

import time
from collections.abc import Callable

import comfy.sample
import numpy as np
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from conftest import GOLDEN
from support.graphs import Graph, Link
from support.model_calls import noise, velocity_of
from support.outcomes import far, latents, near

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.conditioning.mask_and_schedule import apply_mask_and_schedule
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.errors import SliderError
from slider_core.patching.batch_splitting import images_that_fit, split_batches
from slider_core.stable_flow.vital_layers import inject_key_values
from slider_core.training_free.text_modulation import apply_text_modulation
from slider_core.training_free.token_interpolation import apply_token_interpolation

SIGMA, ROWS = 0.7, 24
VALUES = (0.0, 0.4, 0.8, 1.2, 1.6)
IMAGES = len(VALUES)
X = noise(IMAGES, 16, 8, 8, seed=9)


@pytest.fixture(scope="module")
def st():
    return read_adapter(GOLDEN / "examples" / "selective_lora.pt")


@pytest.fixture(scope="module")
def gst():
    return read_adapter(GOLDEN / "examples" / "gstlora_pytorch_lora_weights.safetensors")


def text(strength: object, seed: int = 1, references: int = 1) -> list:
    pooled = noise(1, 768, seed=seed + 1)
    options = {"pooled_output": pooled, "guidance": 3.5}
    if references:
        options["reference_latents"] = [noise(IMAGES, 16, 4, 4, seed=3)]
    spanned = attach_spans([[noise(1, ROWS, 64, seed=seed), options]], ROWS, [Span("first", (2, 3, 4))], padding=2)
    return set_strengths(spanned, {"strength_1": strength})


def counted(model) -> tuple[ModelPatcher, list[int]]:
    """A clone of the model, and how many rows each of its calls had."""
    seen: list[int] = []
    patched = model.clone()

    def count(apply: Callable, args: dict) -> torch.Tensor:
        seen.append(len(args["input"]))
        return apply(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(count)
    return patched, seen


@pytest.mark.parametrize("at_once", [1, 2, 4, 5, 9])
def test_parts_make_the_whole_batch(golden_model, st, gst, at_once):
    """Per-image strengths on the conds and on the model, masks and reference latents of their own, two conds."""
    training_free = apply_token_interpolation(apply_text_modulation(golden_model))
    sliders = apply_gstlora(apply_stlora(training_free, st), gst, VALUES[::-1])
    mask = torch.rand(IMAGES, 8, 8, generator=torch.Generator().manual_seed(0))
    conds = (apply_mask_and_schedule(text(VALUES), mask, outside_strength=0.3), text(0.5, seed=5))
    want = velocity_of(sliders, X, SIGMA, *conds)
    counting, seen = counted(sliders)
    found = velocity_of(split_batches(counting, at_once), X, SIGMA, *conds)
    assert near(found, want)
    assert max(seen) <= 2 * at_once
    assert sum(seen) == 3 * IMAGES
    for k in range(IMAGES):
        single = apply_gstlora(apply_stlora(training_free, st), gst, VALUES[IMAGES - 1 - k])
        cond = text(VALUES[k])
        cond[0][1]["reference_latents"] = [cond[0][1]["reference_latents"][0][k : k + 1]]
        cond = apply_mask_and_schedule(cond, mask[k], outside_strength=0.3)
        assert near(found[k : k + 1], velocity_of(single, X[k : k + 1], SIGMA, cond))


def test_every_part_has_ids_of_its_own(golden_model):
    """By which EasyCache tells the pictures of a step apart."""
    seen = []
    patched = golden_model.clone()

    def note(executor, *args, **kwargs):
        [options] = [one for one in (*args, *kwargs.values()) if isinstance(one, dict) and "uuids" in one]
        seen.append(tuple(options["uuids"]))
        return executor(*args, **kwargs)

    patched.add_wrapper(WrappersMP.DIFFUSION_MODEL, note)
    velocity_of(split_batches(patched, 2), X, SIGMA, text(1.0))
    assert len(seen) == len(set(seen)) == -(-IMAGES // 2)


def test_sliders_may_come_after(golden_model, gst):
    want = velocity_of(apply_gstlora(golden_model, gst, VALUES), X, SIGMA, text(1.0))
    assert near(velocity_of(apply_gstlora(split_batches(golden_model, 2), gst, VALUES), X, SIGMA, text(1.0)), want)


def test_as_many_as_fit(golden_model):
    assert images_that_fit(10, 1000.0, 1e9) == 10
    assert images_that_fit(10, 1000.0, 600.0) == 4
    assert images_that_fit(10, 1000.0, 1.0) == 1
    counting, seen = counted(golden_model)
    velocity_of(split_batches(counting, 0), X, SIGMA, text(1.0))
    assert seen == [IMAGES]


@pytest.mark.parametrize(("at_once", "room"), [(0, 1), (2, 2), (9, IMAGES)])
def test_room_is_made_for_the_images_at_once_alone(golden_model, at_once, room):
    """The model is not pushed out of memory for a batch that is never computed together."""
    shapes = []

    def record(executor, model, noise_shape, *args, **more):
        shapes.append(list(noise_shape))
        return executor(model, noise_shape, *args, **more)

    model = split_batches(golden_model, at_once)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", record)
    empty = torch.zeros_like(X)
    found = comfy.sample.sample(model, X, 1, 1.0, "euler", "simple", text(1.0), text(1.0), empty, disable_pbar=True)
    assert found.shape == X.shape
    assert shapes == [[room, 16, 8, 8]]


def test_what_cannot_be_split(golden_model, gst):
    with pytest.raises(SliderError, match=r"already has a .Split Batch \(Low VRAM\)"):
        split_batches(split_batches(golden_model, 2), 3)
    with pytest.raises(SliderError, match="3 strengths for a batch of 5"):
        velocity_of(split_batches(apply_gstlora(golden_model, gst, (0.0, 0.5, 1.0)), 3), X, SIGMA, text(1.0))
    injecting = inject_key_values(golden_model, [0])
    with pytest.raises(SliderError, match="one image of the batch for another"):
        velocity_of(split_batches(injecting, 3), X, SIGMA, text(1.0))
    assert near(
        velocity_of(split_batches(injecting, IMAGES), X, SIGMA, text(1.0)),
        velocity_of(injecting, X, SIGMA, text(1.0)),
    )


# --- whole graphs

PROMPT = "make the cat older\nmake the wall golden"
DOWN, ACROSS = "0, 1.5", "0.2, 1, 1.4"


def swept(at_once: int | None, **more) -> Callable[[Graph], Link]:
    def part(g: Graph) -> Link:
        lists = (g.add("EditSlidersStrengthList", values=values) for values in (DOWN, ACROSS))
        down = g.add("EditSlidersStrengthGrid", **dict(zip(("down", "across"), lists)))
        across = [down[0], 1]
        model = g.gstlora(g.stlora(g.model()), across)
        if at_once is not None:
            model = g.add("EditSlidersImagesAtOnce", model=model, at_once=at_once)
        latent = g.add("EditSlidersLatentForSweep", latent=g.noise(), strengths=down)
        return g.sample(model, g.edited(g.strengths(g.instructions(PROMPT), down)), latent=latent, **more)

    return part


def single(down: float, across: float) -> Callable[[Graph], Link]:
    return lambda g: g.sample(
        g.gstlora(g.stlora(g.model()), across), g.edited(g.strengths(g.instructions(PROMPT), down))
    )


def test_a_grid_in_parts_equals_one_batch_and_single_runs(server):
    combinations = [(down, across) for down in (0.0, 1.5) for across in (0.2, 1.0, 1.4)]
    whole, *parts = latents(server, swept(None), swept(0), swept(1), swept(4))
    assert len(whole) == 6
    for part in parts:
        assert near(part, whole)
    singles = latents(server, *(single(*one) for one in combinations))
    for k, one in enumerate(singles):
        assert near(whole[k], one[0])
        assert all(far(one, other) for other in singles[:k])
    guided = latents(server, swept(None, cfg=2.0), swept(4, cfg=2.0))
    assert near(*guided)


def test_an_interrupted_run_leaves_nothing(server):
    first = latents(server, swept(2), swept(None))
    graph = Graph()
    graph.save(swept(2, steps=2000)(graph))
    prompt = server.submit(graph)
    time.sleep(2)
    server.interrupt()
    assert server.wait(prompt).interrupted
    server.free()
    for part, want in zip((swept(2), swept(None)), first):
        assert np.array_equal(latents(server, part)[0], want)
