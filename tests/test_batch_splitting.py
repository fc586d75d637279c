"""Split batches: the model computes a few images per call, with the results of the full batch."""

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
from support.outcomes import differ, latents, near

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

SIGMA, TEXT_TOKENS = 0.7, 24
STRENGTHS = (0.0, 0.4, 0.8, 1.2, 1.6)
NUM_IMAGES = len(STRENGTHS)
X = noise(NUM_IMAGES, 16, 8, 8, seed=9)


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
        options["reference_latents"] = [noise(NUM_IMAGES, 16, 4, 4, seed=3)]
    spanned = attach_spans(
        [[noise(1, TEXT_TOKENS, 64, seed=seed), options]], TEXT_TOKENS, [Span("first", (2, 3, 4))], padding=2
    )
    return set_strengths(spanned, {"strength_1": strength})


def count_calls(model) -> tuple[ModelPatcher, list[int]]:
    """A clone of the model and the list of its calls' batch sizes, which grows with each call."""
    batch_sizes: list[int] = []
    patched = model.clone()

    def count(apply: Callable, args: dict) -> torch.Tensor:
        batch_sizes.append(len(args["input"]))
        return apply(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(count)
    return patched, batch_sizes


@pytest.mark.parametrize("at_once", [1, 2, 4, 5, 9])
def test_split_batch_equals_the_full_batch(golden_model, st, gst, at_once):
    """Strengths, masks and reference latents per image, strengths on conds and on the model, two conds."""
    training_free = apply_token_interpolation(apply_text_modulation(golden_model))
    sliders = apply_gstlora(apply_stlora(training_free, st), gst, STRENGTHS[::-1])
    mask = torch.rand(NUM_IMAGES, 8, 8, generator=torch.Generator().manual_seed(0))
    conds = (apply_mask_and_schedule(text(STRENGTHS), mask, outside_strength=0.3), text(0.5, seed=5))
    expected = velocity_of(sliders, X, SIGMA, *conds)
    counting_model, batch_sizes = count_calls(sliders)
    split = velocity_of(split_batches(counting_model, at_once), X, SIGMA, *conds)
    assert near(split, expected)
    assert max(batch_sizes) <= 2 * at_once
    assert sum(batch_sizes) == 3 * NUM_IMAGES
    for k in range(NUM_IMAGES):
        single = apply_gstlora(apply_stlora(training_free, st), gst, STRENGTHS[NUM_IMAGES - 1 - k])
        cond = text(STRENGTHS[k])
        cond[0][1]["reference_latents"] = [cond[0][1]["reference_latents"][0][k : k + 1]]
        cond = apply_mask_and_schedule(cond, mask[k], outside_strength=0.3)
        assert near(split[k : k + 1], velocity_of(single, X[k : k + 1], SIGMA, cond))


def test_each_slice_has_its_own_uuids(golden_model):
    """EasyCache distinguishes the conds of a step by their uuids."""
    calls = []
    patched = golden_model.clone()

    def record(executor, *args, **kwargs):
        [options] = [value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "uuids" in value]
        calls.append(tuple(options["uuids"]))
        return executor(*args, **kwargs)

    patched.add_wrapper(WrappersMP.DIFFUSION_MODEL, record)
    velocity_of(split_batches(patched, 2), X, SIGMA, text(1.0))
    assert len(calls) == len(set(calls)) == -(-NUM_IMAGES // 2)


def test_sliders_applied_after_the_split(golden_model, gst):
    expected = velocity_of(apply_gstlora(golden_model, gst, STRENGTHS), X, SIGMA, text(1.0))
    assert near(
        velocity_of(apply_gstlora(split_batches(golden_model, 2), gst, STRENGTHS), X, SIGMA, text(1.0)), expected
    )


def test_automatic_batch_size(golden_model):
    assert images_that_fit(10, 1000.0, 1e9) == 10
    assert images_that_fit(10, 1000.0, 600.0) == 4
    assert images_that_fit(10, 1000.0, 1.0) == 1
    counting_model, batch_sizes = count_calls(golden_model)
    velocity_of(split_batches(counting_model, 0), X, SIGMA, text(1.0))
    assert batch_sizes == [NUM_IMAGES]


@pytest.mark.parametrize(("at_once", "num_images"), [(0, 1), (2, 2), (9, NUM_IMAGES)])
def test_memory_is_reserved_for_one_slice_only(golden_model, at_once, num_images):
    """ComfyUI would unload models to make room for the full batch, which is never computed at once."""
    shapes = []

    def record(executor, model, noise_shape, *args, **more):
        shapes.append(list(noise_shape))
        return executor(model, noise_shape, *args, **more)

    model = split_batches(golden_model, at_once)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", record)
    empty_latent = torch.zeros_like(X)
    split = comfy.sample.sample(
        model, X, 1, 1.0, "euler", "simple", text(1.0), text(1.0), empty_latent, disable_pbar=True
    )
    assert split.shape == X.shape
    assert shapes == [[num_images, 16, 8, 8]]


def test_errors(golden_model, gst):
    with pytest.raises(SliderError, match=r"already has a .Split Batch \(Low VRAM\)"):
        split_batches(split_batches(golden_model, 2), 3)
    with pytest.raises(SliderError, match="3 strengths for a batch of 5"):
        velocity_of(split_batches(apply_gstlora(golden_model, gst, (0.0, 0.5, 1.0)), 3), X, SIGMA, text(1.0))
    injecting = inject_key_values(golden_model, [0])
    with pytest.raises(SliderError, match="one image of the batch for another"):
        velocity_of(split_batches(injecting, 3), X, SIGMA, text(1.0))
    assert near(
        velocity_of(split_batches(injecting, NUM_IMAGES), X, SIGMA, text(1.0)),
        velocity_of(injecting, X, SIGMA, text(1.0)),
    )


# --- graphs on a server

PROMPT = "make the cat older\nmake the wall golden"
DOWN, ACROSS = "0, 1.5", "0.2, 1, 1.4"


def swept(at_once: int | None, **more) -> Callable[[Graph], Link]:
    def build(g: Graph) -> Link:
        lists = (g.add("EditSlidersStrengthList", values=values) for values in (DOWN, ACROSS))
        down = g.add("EditSlidersStrengthGrid", **dict(zip(("down", "across"), lists)))
        across = [down[0], 1]
        model = g.gstlora(g.stlora(g.model()), across)
        if at_once is not None:
            model = g.add("EditSlidersImagesAtOnce", model=model, at_once=at_once)
        latent = g.add("EditSlidersLatentForSweep", latent=g.noise(), strengths=down)
        return g.sample(model, g.edited(g.strengths(g.instructions(PROMPT), down)), latent=latent, **more)

    return build


def single(down: float, across: float) -> Callable[[Graph], Link]:
    return lambda g: g.sample(
        g.gstlora(g.stlora(g.model()), across), g.edited(g.strengths(g.instructions(PROMPT), down))
    )


def test_split_grid_equals_the_full_batch_and_single_runs(server):
    combinations = [(down, across) for down in (0.0, 1.5) for across in (0.2, 1.0, 1.4)]
    full_batch, *splits = latents(server, swept(None), swept(0), swept(1), swept(4))
    assert len(full_batch) == 6
    for latent in splits:
        assert near(latent, full_batch)
    single_runs = latents(server, *(single(*strengths) for strengths in combinations))
    for k, single_latents in enumerate(single_runs):
        assert near(full_batch[k], single_latents[0])
        assert all(differ(single_latents, other) for other in single_runs[:k])
    guided = latents(server, swept(None, cfg=2.0), swept(4, cfg=2.0))
    assert near(*guided)


def test_interrupted_run_leaves_no_state(server):
    first = latents(server, swept(2), swept(None))
    graph = Graph()
    graph.save(swept(2, steps=2000)(graph))
    prompt = server.submit(graph)
    time.sleep(2)
    server.interrupt()
    assert server.wait(prompt).interrupted
    server.free()
    for build, expected in zip((swept(2), swept(None)), first):
        assert np.array_equal(latents(server, build)[0], expected)
