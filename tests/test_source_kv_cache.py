"""Cached sources: equal to the source in the batch, in RAM or recomputed, and combined with other patches."""

from __future__ import annotations

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from conftest import GOLDEN
from support.model_calls import compiled, noise
from support.outcomes import differ, near
from support.stable_flow import LATENT, TEXT_TOKENS, batched_text, edit_text, euler, photo, sigmas_of, source_text

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.conditioning.active_region import ActiveRegion
from slider_core.errors import SliderError
from slider_core.patching.batch_splitting import split_batches
from slider_core.sampling.deterministic_samplers import ONE_CALL_PER_STEP
from slider_core.sampling.sampling_settings import SamplingSettings
from slider_core.stable_flow import source_kv_cache
from slider_core.stable_flow.inversion import SourceMode, edit_from_trajectory, invert
from slider_core.stable_flow.source_kv_cache import (
    cache_source_kv,
    cache_trajectory_kv,
    check_cached_source,
    describe_memory,
    inject_cached,
    kv_num_bytes,
)
from slider_core.stable_flow.vital_layers import bypass_blocks, inject_key_values

LAYERS, STEPS = [0, 2, 4, 6], 3
IN_RAM_AND_RECOMPUTED = pytest.mark.parametrize("limit", [0.0, 1e-9], ids=["in RAM", "recomputed"])
GSTLORA = GOLDEN / "examples" / "gstlora_pytorch_lora_weights.safetensors"


def cache_source(
    model, limit: float = 0.0, layers=LAYERS, text=None, steps: int = STEPS, latent=LATENT, sampler: str = "euler"
):
    empty, settings = torch.zeros(latent), SamplingSettings(steps, 5, sampler)
    start = comfy.sample.prepare_noise(empty, 5)
    return cache_source_kv(model, text or source_text(), empty, start, layers, settings, limit)


def sample_edit(
    model, text, images: int = 1, sampler: str = "euler", steps: int = STEPS, latent=LATENT
) -> torch.Tensor:
    start = comfy.sample.prepare_noise(torch.zeros(latent), 5).repeat(images, 1, 1, 1)
    return comfy.sample.sample(
        model, start, steps, 1.0, sampler, "simple", text, text, torch.zeros_like(start), disable_pbar=True, seed=0
    )


@IN_RAM_AND_RECOMPUTED
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_equals_the_source_in_the_batch(golden_model, limit, strength):
    together = sample_edit(inject_key_values(golden_model, LAYERS, strength=strength), batched_text(), 3)
    cache, source = cache_source(golden_model, limit)
    assert cache.in_memory == (limit == 0)
    model = inject_cached(golden_model, cache, strength)
    assert near(source, together[:1])
    for k in (1, 2):
        assert near(sample_edit(model, edit_text(k)), together[k : k + 1])
    assert near(sample_edit(model, batched_text(edits_only=True), 2), together[1:])
    assert differ(sample_edit(golden_model, edit_text(1)), together[1:2])


@IN_RAM_AND_RECOMPUTED
def test_mask_equals_that_on_a_source_in_the_batch(golden_model, limit):
    mask = torch.zeros(1, 64, 64)
    mask[:, :24, :40] = 0.8
    together = sample_edit(inject_key_values(golden_model, LAYERS, region=ActiveRegion(mask)), batched_text(), 3)
    cache, _ = cache_source(golden_model, limit)
    masked = sample_edit(inject_cached(golden_model, cache, region=ActiveRegion(mask)), edit_text(1))
    assert near(masked, together[1:2])
    assert differ(masked, sample_edit(inject_cached(golden_model, cache), edit_text(1)))


@IN_RAM_AND_RECOMPUTED
def test_split_batches(golden_model, limit):
    model = inject_cached(golden_model, cache_source(golden_model, limit)[0])
    text = batched_text(edits_only=True)
    batch = sample_edit(model, text, 2)
    assert near(sample_edit(split_batches(model, 1), text, 2), batch)
    assert differ(batch[:1], batch[1:])


def test_source_with_another_text_length_and_reference_latents(golden_model):
    """A source that cannot share a batch with its edit works too, with equal results in RAM and recomputed."""
    more = {"reference_latents": [noise(1, 16, 4, 8, seed=8)], "reference_latents_method": "offset"}
    in_ram, recomputed = (
        cache_source(golden_model, limit, text=source_text(num_tokens=9, **more))[0] for limit in (0.0, 1e-9)
    )
    outs = [sample_edit(inject_cached(golden_model, cache), edit_text(1)) for cache in (in_ram, recomputed)]
    assert near(*outs)
    assert differ(outs[0], sample_edit(golden_model, edit_text(1)))
    plain = cache_source(golden_model)[0]
    assert differ(outs[0], sample_edit(inject_cached(golden_model, plain), edit_text(1)))


def test_sliders_of_source_and_edit_are_independent(golden_model):
    """An adapter on the edit's model only, and on the source's model only."""
    adapter = read_adapter(GSTLORA)
    with_adapter = apply_gstlora(golden_model, adapter, 0.2)
    for source_model, edit_model in ((golden_model, with_adapter), (with_adapter, golden_model)):
        in_ram, recomputed = (cache_source(source_model, limit)[0] for limit in (0.0, 1e-9))
        outs = [sample_edit(inject_cached(edit_model, cache), edit_text(1)) for cache in (in_ram, recomputed)]
        assert near(*outs)
        assert differ(outs[0], sample_edit(inject_cached(edit_model, cache_source(edit_model)[0]), edit_text(1)))


@IN_RAM_AND_RECOMPUTED
def test_torch_compile(golden_model, limit):
    torch._dynamo.reset()
    expected = sample_edit(inject_cached(golden_model, cache_source(golden_model)[0]), edit_text(1))
    cache, _ = cache_source(compiled(golden_model), limit)
    assert near(sample_edit(compiled(inject_cached(golden_model, cache)), edit_text(1)), expected)


@IN_RAM_AND_RECOMPUTED
@pytest.mark.parametrize("num_tokens", [TEXT_TOKENS, 11], ids=["one call", "two calls"])
def test_cond_and_uncond(golden_model, limit, num_tokens):
    """With cfg the cached source acts on both, in one call or in two. One Euler step is linear in cfg."""
    model = inject_cached(golden_model, cache_source(golden_model, limit, steps=1)[0])
    start, empty = comfy.sample.prepare_noise(torch.zeros(LATENT), 5), torch.zeros(LATENT)
    text, negative = edit_text(1), edit_text(2, num_tokens=num_tokens)
    guided = comfy.sample.sample(
        model, start, 1, 3.0, "euler", "simple", text, negative, empty, disable_pbar=True, seed=0
    )
    cond, uncond = sample_edit(model, text, steps=1), sample_edit(model, negative, steps=1)
    assert near(guided, uncond + 3.0 * (cond - uncond))
    assert differ(cond, uncond)


def test_schedule_ranges_and_strength_zero(golden_model):
    cache, _ = cache_source(golden_model)
    for settings in (
        {"region": ActiveRegion(None, 0.0, 0.3)},
        {"region": ActiveRegion(None, 0.3, 1.0)},
        {"strength": 0.0},
    ):
        together = sample_edit(inject_key_values(golden_model, LAYERS, **settings), batched_text(), 3)
        assert near(sample_edit(inject_cached(golden_model, cache, **settings), edit_text(1)), together[1:2])
        assert differ(sample_edit(inject_cached(golden_model, cache), edit_text(1)), together[1:2])


@IN_RAM_AND_RECOMPUTED
def test_source_from_a_trajectory(golden_model, limit):
    trajectory = invert(golden_model, source_text(guidance=1.0), photo(golden_model), sigmas_of(golden_model), "a")
    together = edit_from_trajectory(
        inject_key_values(golden_model, LAYERS), batched_text((1.0, 3.0, 3.0)), trajectory, SourceMode.TRAJECTORY
    )
    cache = cache_trajectory_kv(golden_model, trajectory, LAYERS, limit)
    assert cache.in_memory == (limit == 0)
    model = inject_cached(golden_model, cache)
    for k in (1, 2):
        alone = edit_from_trajectory(model, edit_text(k, guidance=3.0), trajectory, SourceMode.CACHED)
        assert near(alone, together[k : k + 1])


def test_memory_descriptions(golden_model):
    needed = kv_num_bytes(golden_model, LAYERS, LATENT, STEPS)
    cache, _ = cache_source(golden_model)
    assert needed == sum(step.key_values.nbytes for step in cache.cached_steps) == cache.num_bytes
    assert "3 steps x 4 layers: 0.4 MB" in cache.describe()
    assert "costs two generations" in cache_source(golden_model, 1e-9)[0].describe()


def test_running_out_of_memory_midway(golden_model, monkeypatch):
    expected = sample_edit(inject_cached(golden_model, cache_source(golden_model)[0]), edit_text(1))
    allocate_kv, calls = source_kv_cache._allocate_kv, []

    def allocate_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return allocate_kv(*args)

    with monkeypatch.context() as patch:
        patch.setattr(source_kv_cache, "_allocate_kv", allocate_once)
        cache, _ = cache_source(golden_model)
    assert len(calls) == 2
    assert not cache.in_memory
    assert all(step.key_values is None for step in cache.cached_steps)
    assert near(sample_edit(inject_cached(golden_model, cache), edit_text(1)), expected)


def test_memory_limit(golden_model, monkeypatch):
    """Without a limit at most half of the free memory is used; with one, at most the limit and the free memory."""
    needed = kv_num_bytes(golden_model, LAYERS, LATENT, STEPS)
    for free, limit, in_ram in (
        (2 * needed + 2, 0.0, True),
        (2 * needed - 2, 0.0, False),
        (2 * needed - 2, 1.0, True),
        (needed - 2, 1.0, False),
        (4 * needed, 0.5 * needed / 1e9, False),
    ):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, free=free, **__: free)
        assert cache_source(golden_model, limit)[0].in_memory == in_ram
        description = describe_memory(golden_model, LAYERS, LATENT, STEPS, limit)
        assert "The source takes 0.4 MB of RAM" in description
        assert ("recomputed" in description) != in_ram


def test_cache_has_the_dtype_of_the_model(recipe, manifest):
    weights = {key: value.bfloat16() for key, value in recipe.flux_weights(manifest["model"]).items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.bfloat16})
    model.set_model_compute_dtype(torch.bfloat16)
    cache, _ = cache_source(model)
    assert {step.key_values.dtype for step in cache.cached_steps} == {torch.bfloat16}
    together = sample_edit(inject_key_values(model, LAYERS), batched_text(), 3)
    alone, bare = sample_edit(inject_cached(model, cache), edit_text(1)), sample_edit(model, edit_text(1))
    assert (alone - together[1:2]).norm() < 0.1 * (bare - together[1:2]).norm()


def test_comfyui_can_count_the_memory_of_a_cache(golden_model):
    """ComfyUI's cache counts tensors in lists and tuples."""

    def num_bytes(value: object) -> int:
        if isinstance(value, (list, tuple)):
            return sum(map(num_bytes, value))
        return value.nbytes if isinstance(value, torch.Tensor) else 0

    cache, _ = cache_source(golden_model)
    assert num_bytes(cache) > cache.num_bytes


def test_samplers(golden_model):
    """Supported samplers give the result of the source in the batch; others are refused."""
    for sampler in ONE_CALL_PER_STEP:
        cache, _ = cache_source(golden_model, sampler=sampler)
        together = sample_edit(inject_key_values(golden_model, LAYERS), batched_text(), 3, sampler)
        single = sample_edit(inject_cached(golden_model, cache), edit_text(1), sampler=sampler)
        assert near(single, together[1:2]), sampler
    for sampler in ("heun", "dpmpp_sde"):
        with pytest.raises(SliderError, match=r"calls the model several times .* expected one of euler, ddim"):
            cache_source(golden_model, sampler=sampler)


def test_invalid_arguments(golden_model, recipe, manifest):
    cache, _ = cache_source(golden_model)
    model = inject_cached(golden_model, cache)
    with pytest.raises(SliderError, match=r"not computed at noise level .* \(3 steps, scheduler simple\)"):
        sample_edit(model, edit_text(1), steps=4)
    with pytest.raises(SliderError, match="latent of 8 x 8, this image one of 12 x 8; expected the same size"):
        sample_edit(model, edit_text(1), latent=(1, 16, 8, 12))
    with pytest.raises(SliderError, match="no layer 7; expected layers from 0 to 6"):
        cache_source(golden_model, layers=[0, 7])
    with pytest.raises(SliderError, match="has 2 images; expected one, the source"):
        cache_source(golden_model, latent=(2, *LATENT[1:]))
    with pytest.raises(SliderError, match="several conditionings"):
        cache_source(golden_model, text=[*source_text(), *edit_text(1)])
    with pytest.raises(SliderError, match="expected 0 <= start < end"):
        inject_cached(golden_model, cache, region=ActiveRegion(None, 0.6, 0.4))
    with pytest.raises(SliderError, match=r"cached source was made with a different FLUX\.1 model"):
        inject_cached(other_model(recipe, manifest["model"] | {"seed": 99}), cache)
    with pytest.raises(SliderError, match=r"256 wide; this one is FLUX\.1, 128 wide"):
        inject_cached(other_model(recipe, manifest["model"] | {"hidden": 128}), cache)


def other_model(recipe, config):
    return comfy.sd.load_diffusion_model_state_dict(recipe.flux_weights(config), model_options={"dtype": torch.float32})


def with_lora(model, strength: float):
    """The model with a weight patch of ComfyUI's own kind."""
    patched, key = model.clone(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    shape = model.model.state_dict()[key].shape
    patched.add_patches({key: ("diff", (0.05 * noise(*shape, seed=3),))}, strength)
    return patched


@pytest.mark.usefixtures("unpatch_golden_model")
def test_loras_of_source_and_edit(golden_model):
    """Keys and values in RAM work with any LoRAs on the edit's model; recomputed ones need the source's LoRAs."""
    lora = with_lora(golden_model, 1.0)
    in_ram, recomputed = (cache_source(lora, limit)[0] for limit in (0.0, 1e-9))
    assert near(
        sample_edit(inject_cached(lora, in_ram), edit_text(1)),
        sample_edit(inject_cached(lora, recomputed), edit_text(1)),
    )
    sample_edit(inject_cached(golden_model, in_ram), edit_text(1))
    for other in (golden_model, with_lora(golden_model, 0.5)):
        with pytest.raises(SliderError, match="other LoRAs than the source's"):
            sample_edit(inject_cached(other, recomputed), edit_text(1))


def test_patches_of_other_nodes_act_on_their_own_model(golden_model):
    """An attention patch on the source's or on the edit's model only: in RAM equals recomputed."""
    patched = golden_model.clone()
    patched.set_model_attn1_patch(lambda q, k, v, **_: {"q": 0.5 * q, "k": k, "v": v})
    for source_model, edit_model in ((golden_model, patched), (patched, golden_model)):
        in_ram, recomputed = (cache_source(source_model, limit)[0] for limit in (0.0, 1e-9))
        outs = [sample_edit(inject_cached(edit_model, cache), edit_text(1)) for cache in (in_ram, recomputed)]
        assert near(*outs)
        assert differ(outs[0], sample_edit(inject_cached(edit_model, cache_source(edit_model)[0]), edit_text(1)))


def test_skipped_layers(golden_model):
    """Keys and values that the source did not compute are refused, not read from uninitialized memory."""
    skipping = golden_model.clone()
    skipping.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 1)
    cache_source(skipping, layers=[0, 2])
    with pytest.raises(SliderError, match=r"not computed in a step.*EasyCache"):
        cache_source(skipping)
    cache, _ = cache_source(skipping, 1e-9)
    with pytest.raises(SliderError, match="not computed in a step"):
        sample_edit(inject_cached(golden_model, cache), edit_text(1))
    with pytest.raises(SliderError, match="not computed in a step"):
        cache_source(bypass_blocks(golden_model, [4]))


def test_sources_that_cannot_be_cached(golden_model):
    [[cond, options]] = source_text()
    area = [[cond, {**options, "area": (4, 8, 0, 0), "strength": 1.0}]]
    with pytest.raises(SliderError, match="covers 8 x 4 of a latent of 8 x 8"):
        cache_source(golden_model, text=area)
    half = [[cond, {**options, "start_percent": 0.0, "end_percent": 0.5}]]
    with pytest.raises(SliderError, match="Remove timestep ranges"):
        cache_source(golden_model, text=half)
    guided = golden_model.clone()
    guided.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    with pytest.raises(SliderError, match="computes the negative prompt too"):
        cache_source(guided)
    control = golden_model.clone()
    control.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL,
        "test",
        lambda executor, x, t, c, text, control, *rest, **more: executor(x, t, c, text, {"input": []}, *rest, **more),
    )
    with pytest.raises(SliderError, match="has a ControlNet"):
        cache_source(control)
    with pytest.raises(SliderError, match="not flow matching"):
        cache_source(with_eps_sampling(golden_model))


def with_eps_sampling(model):
    other = model.clone()
    other.add_object_patch("model_sampling", comfy.model_sampling.EPS())
    return other


def test_mismatched_trajectories(golden_model, recipe, manifest):
    sigmas = sigmas_of(golden_model)
    one, two = (
        invert(golden_model, source_text(), photo(golden_model) + k, sigmas, "a", nudging=1.0) for k in range(2)
    )
    with pytest.raises(SliderError, match="The trajectory was made with a different"):
        cache_trajectory_kv(other_model(recipe, manifest["model"] | {"seed": 99}), one, LAYERS)
    with pytest.raises(SliderError, match="not flow matching"):
        cache_trajectory_kv(with_eps_sampling(golden_model), one, LAYERS)
    model = inject_cached(golden_model, cache_trajectory_kv(golden_model, one, LAYERS))
    check_cached_source(model, one)
    with pytest.raises(SliderError, match="cached source is not this trajectory"):
        check_cached_source(model, two)
    with pytest.raises(SliderError, match="cached source is not this trajectory"):
        check_cached_source(inject_cached(golden_model, cache_source(golden_model)[0]), one)
    with pytest.raises(SliderError, match="has no cached source"):
        check_cached_source(inject_key_values(golden_model, LAYERS), one)


def test_samplers_that_add_noise_are_refused(golden_model):
    model = inject_cached(golden_model, cache_source(golden_model)[0])
    with pytest.raises(SliderError, match="'euler_ancestral' adds new noise"):
        sample_edit(model, edit_text(1), sampler="euler_ancestral")


def test_the_model_stays_unpatched(golden_model):
    before = sample_edit(golden_model, edit_text(1))
    cache, _ = cache_source(golden_model)
    sample_edit(inject_cached(golden_model, cache), edit_text(1))
    assert torch.equal(sample_edit(golden_model, edit_text(1)), before)


def test_cached_source_equals_euler_steps(golden_model):
    """The latent that cache_source_kv returns."""
    _, source = cache_source(golden_model)
    assert near(source, euler(golden_model, source_text(), STEPS))
