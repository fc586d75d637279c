"""A remembered source: equal to the source in the batch, kept or computed again, with other things on the model."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import pytest
import torch
from conftest import GOLDEN
from support.model_calls import compiled, noise
from support.outcomes import far, near
from support.stable_flow import LATENT, edit_text, euler, photo, sigmas_of, source_text, stacked_text

from slider_core.adapter_file import read_adapter
from slider_core.errors import SliderError
from slider_core.fitting_samplers import ONE_CALL_PER_STEP
from slider_core.global_lora import apply_gstlora
from slider_core.inversion import FOLLOWS, FREE, edit_from_trajectory, invert
from slider_core.reference_cache import inject_cached, memory_needed, remember_sampling, remember_trajectory
from slider_core.vital_layers import inject_key_values

LAYERS, STEPS = [0, 2, 4, 6], 3
GSTLORA = GOLDEN / "examples" / "gstlora_pytorch_lora_weights.safetensors"


def remembered(model, limit: float = 0.0, layers=LAYERS, text=None, steps: int = STEPS, latent=LATENT, **more):
    options = {"seed": 5, "sampler": "euler", "scheduler": "simple", "limit": limit, **more}
    return remember_sampling(model, text or source_text(), torch.zeros(latent), layers, steps=steps, **options)


def edited(model, text, pictures: int = 1, sampler: str = "euler", steps: int = STEPS, latent=LATENT) -> torch.Tensor:
    start = comfy.sample.prepare_noise(torch.zeros(latent), 5).repeat(pictures, 1, 1, 1)
    return comfy.sample.sample(
        model, start, steps, 1.0, sampler, "simple", text, text, torch.zeros_like(start), disable_pbar=True, seed=0
    )


@pytest.mark.parametrize("limit", [0.0, 1e-9], ids=["kept", "computed again"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_equals_the_source_in_the_batch(golden_model, limit, strength):
    together = edited(inject_key_values(golden_model, LAYERS, strength=strength), stacked_text(), 3)
    cache, source = remembered(golden_model, limit)
    assert cache.kept == (limit == 0)
    model = inject_cached(golden_model, cache, strength)
    assert near(source, together[:1])
    for k in (1, 2):
        assert near(edited(model, edit_text(k)), together[k : k + 1])
    assert near(edited(model, stacked_text(edits_only=True), 2), together[1:])
    assert far(edited(golden_model, edit_text(1)), together[1:2])


def test_texts_of_other_lengths_and_reference_latents(golden_model):
    """What cannot be stacked in one batch works, and alike in both ways."""
    more = {"reference_latents": [noise(1, 16, 4, 8, seed=8)], "reference_latents_method": "offset"}
    kept, again = (remembered(golden_model, limit, text=source_text(rows=9, **more))[0] for limit in (0.0, 1e-9))
    outs = [edited(inject_cached(golden_model, cache), edit_text(1)) for cache in (kept, again)]
    assert near(*outs)
    assert far(outs[0], edited(golden_model, edit_text(1)))
    plain = remembered(golden_model)[0]
    assert far(outs[0], edited(inject_cached(golden_model, plain), edit_text(1)))


def test_sliders_of_source_and_edit_stay_apart(golden_model):
    """The source without, the edit with an adapter; and the other way round."""
    adapter = read_adapter(GSTLORA)
    moved = apply_gstlora(golden_model, adapter, 0.2)
    for of_source, of_edit in ((golden_model, moved), (moved, golden_model)):
        kept, again = (remembered(of_source, limit)[0] for limit in (0.0, 1e-9))
        outs = [edited(inject_cached(of_edit, cache), edit_text(1)) for cache in (kept, again)]
        assert near(*outs)
        assert far(outs[0], edited(inject_cached(of_edit, remembered(of_edit)[0]), edit_text(1)))


@pytest.mark.parametrize("limit", [0.0, 1e-9], ids=["kept", "computed again"])
def test_torch_compile(golden_model, limit):
    torch._dynamo.reset()
    want = edited(inject_cached(golden_model, remembered(golden_model)[0]), edit_text(1))
    cache, _ = remembered(compiled(golden_model), limit)
    assert near(edited(compiled(inject_cached(golden_model, cache)), edit_text(1)), want)


def test_cond_and_uncond(golden_model):
    """With cfg the remembered source reaches both, in one call or in two."""
    model = inject_cached(golden_model, remembered(golden_model)[0])

    def guided(negative: list, cfg: float) -> torch.Tensor:
        start = comfy.sample.prepare_noise(torch.zeros(LATENT), 5)
        text = edit_text(1)
        return comfy.sample.sample(
            model, start, 1, cfg, "euler", "simple", text, negative, torch.zeros(LATENT), disable_pbar=True
        )

    for negative in (edit_text(2), edit_text(2, rows=11)):
        cond, uncond = (
            guided(negative, 1.0),
            edited(inject_cached(golden_model, remembered(golden_model, steps=1)[0]), negative, steps=1),
        )
        assert near(guided(negative, 3.0), uncond + 3.0 * (cond - uncond))


@pytest.mark.parametrize("limit", [0.0, 1e-9], ids=["kept", "computed again"])
def test_from_a_trajectory(golden_model, limit):
    trajectory = invert(golden_model, source_text(guidance=1.0), photo(golden_model), sigmas_of(golden_model), "a")
    together = edit_from_trajectory(
        inject_key_values(golden_model, LAYERS), stacked_text((1.0, 3.0, 3.0)), trajectory, FOLLOWS
    )
    cache = remember_trajectory(golden_model, trajectory, LAYERS, limit)
    assert cache.kept == (limit == 0)
    model = inject_cached(golden_model, cache)
    for k in (1, 2):
        alone = edit_from_trajectory(model, edit_text(k, guidance=3.0), trajectory, FREE)
        assert near(alone, together[k : k + 1])


def test_what_is_said_about_memory(golden_model):
    needed = memory_needed(golden_model, LAYERS, LATENT, STEPS)
    cache, _ = remembered(golden_model)
    assert needed == sum(moment.key_values.nbytes for moment in cache.moments) == cache.needed
    assert "3 steps x 4 layers: 0.4 MB" in cache.describe()
    assert "costs two generations" in remembered(golden_model, 1e-9)[0].describe()


def test_memory_that_runs_out_midway(golden_model, monkeypatch):
    want = edited(inject_cached(golden_model, remembered(golden_model)[0]), edit_text(1))
    real, rooms = torch.empty, []

    def empty(*args, **kwargs):
        if "pin_memory" in kwargs and len(rooms.append(args) or rooms) == 2:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        cache, _ = remembered(golden_model)
    assert len(rooms) == 2
    assert not cache.kept
    assert all(moment.key_values is None for moment in cache.moments)
    assert near(edited(inject_cached(golden_model, cache), edit_text(1)), want)


def test_free_memory_is_not_used_up(golden_model, monkeypatch):
    needed = memory_needed(golden_model, LAYERS, LATENT, STEPS)
    for free, kept in ((2 * needed + 2, True), (2 * needed - 2, False)):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, free=free, **__: free)
        assert remembered(golden_model)[0].kept == kept


def test_samplers(golden_model):
    """Those that are said to fit do, and give what the source in the batch gives; others are refused."""
    for sampler in ONE_CALL_PER_STEP:
        cache, _ = remembered(golden_model, sampler=sampler)
        together = edited(inject_key_values(golden_model, LAYERS), stacked_text(), 3, sampler)
        assert near(edited(inject_cached(golden_model, cache), edit_text(1), sampler=sampler), together[1:2]), sampler
    for sampler in ("heun", "dpmpp_sde"):
        with pytest.raises(SliderError, match=r"calls the model several times .* expected one of euler, ddim"):
            remembered(golden_model, sampler=sampler)


def test_bad_input(golden_model, recipe, manifest):
    cache, _ = remembered(golden_model)
    model = inject_cached(golden_model, cache)
    with pytest.raises(SliderError, match=r"not computed at noise level .* \(3 steps, scheduler simple\)"):
        edited(model, edit_text(1), steps=4)
    with pytest.raises(SliderError, match="latent of 8 x 8, this picture one of 12 x 8; expected the same size"):
        edited(model, edit_text(1), latent=(1, 16, 8, 12))
    with pytest.raises(SliderError, match="no layer 7; expected layers from 0 to 6"):
        remembered(golden_model, layers=[0, 7])
    with pytest.raises(SliderError, match="has 2 pictures; expected one, the source"):
        remembered(golden_model, latent=(2, *LATENT[1:]))
    with pytest.raises(SliderError, match="several conditionings"):
        remembered(golden_model, text=[*source_text(), *edit_text(1)])
    with pytest.raises(SliderError, match="expected start first"):
        inject_cached(golden_model, cache, start=0.6, end=0.4)
    with pytest.raises(SliderError, match=r"remembered source was made with another FLUX\.1 model"):
        inject_cached(other_model(recipe, manifest["model"] | {"seed": 99}), cache)
    with pytest.raises(SliderError, match=r"256 wide; this one is FLUX\.1, 128 wide"):
        inject_cached(other_model(recipe, manifest["model"] | {"hidden": 128}), cache)


def other_model(recipe, config):
    return comfy.sd.load_diffusion_model_state_dict(recipe.flux_weights(config), model_options={"dtype": torch.float32})


def test_nothing_stays_on_the_model(golden_model):
    before = edited(golden_model, edit_text(1))
    cache, _ = remembered(golden_model)
    edited(inject_cached(golden_model, cache), edit_text(1))
    assert torch.equal(edited(golden_model, edit_text(1)), before)


def test_euler_is_written_out(golden_model):
    """remember_sampling gives what Euler steps by hand give."""
    _, source = remembered(golden_model)
    assert near(source, euler(golden_model, source_text(), STEPS))
