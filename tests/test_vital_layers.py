"""Key/value injection beyond the golden cases: strengths, masks, schedule ranges, refusals, and graphs."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.conds import CONDRegular
from support.graphs import Graph, Link
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import differ, latents, near

from slider_core.conditioning.active_region import ActiveRegion
from slider_core.conditioning.masks import mask_coverage
from slider_core.errors import SliderError
from slider_core.stable_flow.vital_layers import (
    LAYER_SETS,
    bypass_blocks,
    inject_key_values,
    layer_set,
    parse_block_indices,
)

SIGMA, LAYERS = 0.7, [0, 2, 4, 6]
GUIDANCES = {"source_guidance": 1.0, "edit_guidance": 3.0}
X = noise(1, 16, 8, 8, seed=9).repeat(3, 1, 1, 1)


def text(guidances: tuple[float, ...] = (3.5, 3.5, 3.5), **options) -> list:
    guidance = {"guidance": None, "model_conds": {"guidance": CONDRegular(torch.tensor(guidances))}}
    return [[noise(3, 24, 64, seed=1), {"pooled_output": noise(3, 768, seed=2), **guidance, **options}]]


def reference_latent(model) -> dict:
    return {"reference_latents": [noise(1, 16, 8, 4, seed=5)], "reference_latents_method": "offset"}


def test_strength_interpolates_keys_and_values(golden_model):
    plain = velocity_of(golden_model, X, SIGMA, text())
    outs = [velocity_of(inject_key_values(golden_model, LAYERS, strength=s), X, SIGMA, text()) for s in (0, 0.5, 1)]
    assert torch.equal(outs[0], plain)
    assert differ(outs[1][1:], plain[1:])
    assert differ(outs[2][1:], outs[1][1:])
    for out in outs:
        assert torch.equal(out[0], plain[0])


@pytest.mark.parametrize("source_index", [0, 2])
def test_the_source_is_unchanged(golden_model, source_index):
    plain = velocity_of(golden_model, X, SIGMA, text())
    out = velocity_of(inject_key_values(golden_model, LAYERS, source_index), X, SIGMA, text())
    for k in range(3):
        assert torch.equal(out[k], plain[k]) == (k == source_index)


def test_chained_injection_takes_keys_and_values_of_the_previous_image(golden_model):
    """In a layer each image receives the previous image's keys as that image computed them, not as it received them."""
    out = velocity_of(inject_key_values(golden_model, LAYERS, chained=True), X, SIGMA, text())
    of_source = velocity_of(inject_key_values(golden_model, LAYERS), X, SIGMA, text())
    assert near(out[:2], of_source[:2])
    assert differ(out[2], of_source[2])
    captured = []
    key_norm = golden_model.model.diffusion_model.double_blocks[0].img_attn.norm.key_norm
    handle = key_norm.register_forward_pre_hook(lambda module, args: captured.append(args[0].clone()))
    try:
        for chained in (None, True):
            model = inject_key_values(golden_model, [0], chained=True) if chained else golden_model
            velocity_of(model, torch.cat([noise(1, 16, 8, 8, seed=k) for k in range(3)]), SIGMA, text())
    finally:
        handle.remove()
    plain, chained = captured
    assert torch.equal(chained, plain[[0, 0, 1]])


def image_keys(model, x: torch.Tensor, *variants) -> list[torch.Tensor]:
    """Keys of the image tokens in the first layer, per variant of the model: (batch, tokens, width)."""
    captured = []
    key_norm = model.model.diffusion_model.double_blocks[0].img_attn.norm.key_norm
    handle = key_norm.register_forward_pre_hook(lambda module, args: captured.append(args[0].movedim(1, 2).flatten(2)))
    try:
        for variant in variants:
            velocity_of(variant, x, SIGMA, text())
    finally:
        handle.remove()
    return captured


def test_mask(golden_model):
    """An image of 64 x 96: the mask is 1 in the left third and in half of one token's 16 x 16 pixels, otherwise 0."""
    mask = torch.zeros(64, 96)
    mask[:, :32] = 1.0
    mask[16:24, 80:96] = 1.0
    coverage = torch.zeros(4, 6)
    coverage[:, :2] = 1.0
    coverage[1, 5] = 0.5
    coverage = coverage.flatten()[:, None]
    x = torch.cat([noise(1, 16, 8, 12, seed=k) for k in range(3)])
    injections = [
        inject_key_values(golden_model, [0], strength=strength, chained=chained, region=ActiveRegion(mask))
        for strength, chained in ((1.0, False), (0.6, False), (1.0, True))
    ]
    plain, full, weak, chained = image_keys(golden_model, x, golden_model, *injections)
    assert near(full, torch.lerp(plain, plain[:1].expand_as(plain), coverage.expand_as(plain)))
    assert near(weak, torch.lerp(plain, plain[:1].expand_as(plain), 0.6 * coverage.expand_as(plain)))
    assert near(chained, torch.lerp(plain, plain[[0, 0, 1]], coverage.expand_as(plain)))


def test_mask_coverage_of_latents_with_odd_sides():
    """An image of 40 x 56: the tokens of the last row and column extend beyond it."""
    mask = torch.zeros(1, 40, 56)
    mask[:, 32:, :] = 1.0
    mask[:, :16, 48:] = 1.0
    coverage = mask_coverage(mask, (1, 16, 5, 7), (3, 4)).reshape(3, 4)
    assert coverage.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]


def test_mask_with_an_area_conditioning(server):
    """A mask together with an area is refused, either of them alone is not."""

    def run(area: bool, **mask):
        g = Graph()
        prompts = g.add("EditSlidersStackPrompts", clip=g.clip(), source="a cat", edits="a dog", **GUIDANCES)
        if area:
            rectangle = {"width": 64, "height": 128, "x": 64, "y": 0, "strength": 1.0}
            prompts = g.add("ConditioningSetArea", conditioning=prompts, **rectangle)
        empty = g.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
        latent = g.add("EditSlidersSameNoise", latent=empty, images=2)
        injection = {"layers": "listed below", "list": "0-3", "reference": 0, "preservation": 1.0}
        mask = {name: g.add("SolidMask", value=value, width=64, height=64) for name, value in mask.items()}
        model = g.add("EditSlidersInjectVitalLayers", model=g.model(), start=0.0, end=1.0, **injection, **mask)
        g.save(g.sample(model, prompts, latent=latent))
        return server.run(g)

    assert run(area=False, mask=0.5).ok
    assert run(area=True).ok
    refused = run(area=True, mask=0.5)
    assert "A conditioning covers 8 x 16 of a latent of 16 x 16" in refused.error["exception_message"]


def test_uniform_masks(golden_model):
    models = golden_model, inject_key_values(golden_model, [0])
    plain, injected = (velocity_of(model, X, SIGMA, text()) for model in models)
    half = velocity_of(inject_key_values(golden_model, [0], strength=0.5), X, SIGMA, text())
    for mask, expected in (
        (torch.ones(1, 5, 7), injected),
        (torch.zeros(64, 64), plain),
        (torch.full((8, 8), 0.5), half),
    ):
        assert torch.equal(
            velocity_of(inject_key_values(golden_model, [0], region=ActiveRegion(mask)), X, SIGMA, text()), expected
        )
    assert differ(plain[1:], injected[1:])
    for mask, message in (
        (torch.ones(2, 8, 8), "There are 2 masks; expected one"),
        (torch.full((8, 8), 2.0), "values from 2 to 2; expected 0"),
        (torch.ones(8), r"the shape \(8,\); expected"),
    ):
        with pytest.raises(SliderError, match=message):
            inject_key_values(golden_model, [0], region=ActiveRegion(mask))


def test_samplers_that_add_noise_are_refused(golden_model):
    """Of all ComfyUI samplers, exactly those under which two equal images with equal noise come out unequal."""
    same, start = [[*text()[0]]], X[:2]
    [[cond, options]] = same
    same = [[cond[:1], {"pooled_output": options["pooled_output"][:1], "guidance": 3.5}]]
    injected = inject_key_values(golden_model, [0])
    for name in comfy.samplers.SAMPLER_NAMES:
        inputs = (start, 2, 1.0, name, "simple", same, same, torch.zeros_like(start))
        out = comfy.sample.sample(golden_model, *inputs, disable_pbar=True, seed=0)
        if near(out[0], out[1]):
            comfy.sample.sample(injected, *inputs, disable_pbar=True, seed=0)
        else:
            with pytest.raises(SliderError, match=r"adds new noise at every step.*euler, ddim"):
                comfy.sample.sample(injected, *inputs, disable_pbar=True, seed=0)


def test_reference_latents_keep_their_own_keys(golden_model):
    """Injection changes nothing for equal prompts with reference latents, and only image tokens otherwise."""
    model = inject_key_values(golden_model, LAYERS)
    [[cond, options]] = text(**reference_latent(golden_model))
    same = [[cond[:1].repeat(3, 1, 1), {**options, "pooled_output": options["pooled_output"][:1].repeat(3, 1)}]]
    assert near(velocity_of(model, X, SIGMA, same), velocity_of(golden_model, X, SIGMA, same))
    captured = []
    key_norm = golden_model.model.diffusion_model.single_blocks[0].norm.key_norm
    handle = key_norm.register_forward_pre_hook(lambda module, args: captured.append(args[0].clone()))
    try:
        velocity_of(inject_key_values(golden_model, [3]), X, SIGMA, text(**reference_latent(golden_model)))
        velocity_of(golden_model, X, SIGMA, text(**reference_latent(golden_model)))
    finally:
        handle.remove()
    changed = (captured[0] != captured[1]).any(dim=(0, 1, 3)).nonzero().flatten().tolist()
    assert changed == list(range(24, 24 + 16))


def test_schedule_ranges(golden_model):
    plain = velocity_of(golden_model, X, SIGMA, text())
    percent_to_sigma = golden_model.model.model_sampling.percent_to_sigma
    middle = next(p / 100 for p in range(100) if percent_to_sigma(p / 100) < SIGMA)
    unlimited = velocity_of(inject_key_values(golden_model, LAYERS), X, SIGMA, text())
    for start, end, in_range in ((0, middle, True), (middle, 1, False), (middle - 0.05, middle + 0.05, True)):
        model = inject_key_values(golden_model, LAYERS, region=ActiveRegion(None, start, end))
        assert torch.equal(velocity_of(model, X, SIGMA, text()), unlimited if in_range else plain)


def test_each_element_has_its_own_guidance(golden_model):
    out = velocity_of(golden_model, X, SIGMA, text((1.0, 3.0, 8.0)))
    for k, guidance in enumerate((1.0, 3.0, 8.0)):
        assert near(out[k], velocity_of(golden_model, X, SIGMA, text((guidance,) * 3))[k])
    assert differ(out, velocity_of(golden_model, X, SIGMA, text()))


def test_several_conds_in_one_model_call(golden_model):
    model = inject_key_values(golden_model, LAYERS)
    other = [[noise(3, 24, 64, seed=7), text()[0][1]]]
    both = velocity_of(model, X, SIGMA, text(), other)
    assert near(both[:3], velocity_of(model, X, SIGMA, text()))
    assert near(both[3:], velocity_of(model, X, SIGMA, other))


def test_torch_compile(golden_model):
    torch._dynamo.reset()
    expected = velocity_of(inject_key_values(golden_model, LAYERS), X, SIGMA, text())
    model = compiled(inject_key_values(golden_model, LAYERS))
    assert near(velocity_of(model, X, SIGMA, text()), expected)


def test_layer_lists_and_sets(golden_model):
    assert parse_block_indices("0, 1 17-19") == [0, 1, 17, 18, 19]
    for invalid in ("", "a", "1-", "1.5", "-3"):
        with pytest.raises(SliderError, match="expected numbers and ranges"):
            parse_block_indices(invalid)
    assert parse_block_indices("0 - 2,5") == [0, 1, 2, 5]
    with pytest.raises(SliderError, match=r"'5-1' is descending; .* '1-5'"):
        parse_block_indices("0, 5-1")
    sets = {name: layer_set(golden_model, name) for name in LAYER_SETS}
    assert sets["vital layers"] == [0, 1, 2, 17, 18, 25, 28, 53, 54, 56]
    assert 2 not in sets["vital layers without layer 2"]
    assert sets["all layers"] == list(range(7))
    assert sets["all but the vital layers"] == [3, 4, 5, 6]


def test_invalid_arguments(golden_model):
    for method in (inject_key_values, bypass_blocks):
        with pytest.raises(SliderError, match="no layer 17; expected layers from 0 to 6"):
            method(golden_model, [0, 17])
    with pytest.raises(SliderError, match="expected 0 <= start < end"):
        inject_key_values(golden_model, LAYERS, region=ActiveRegion(None, 0.6, 0.4))
    with pytest.raises(SliderError, match=r"source_index is 3, but the batch has 3 images; expected 0 to 2"):
        velocity_of(inject_key_values(golden_model, LAYERS, 3), X, SIGMA, text())
    with pytest.raises(SliderError, match=r"The batch has one image; expected source and edits in one batch"):
        velocity_of(inject_key_values(golden_model, LAYERS), X[:1], SIGMA, text())


def batched(g: Graph, preservation: float, edits: str = "a red cat\n\na dog", **more) -> Link:
    prompts = g.add("EditSlidersStackPrompts", clip=g.clip(), source="a cat", edits=edits, **GUIDANCES)
    latent = g.add("EditSlidersSameNoise", latent=g.noise(), images=[prompts[0], 1])
    inputs = {"layers": "listed below", "list": "0-3", "reference": 0, "start": 0.0, "end": 1.0, **more}
    model = g.add("EditSlidersInjectVitalLayers", model=g.model(), preservation=preservation, **inputs)
    return g.sample(model, prompts, latent=latent)


def test_graphs(server):
    def single(prompt: str, guidance: float):
        def build(g: Graph) -> Link:
            text = g.add("FluxGuidance", conditioning=g.stock_text(prompt), guidance=guidance)
            return g.sample(g.model(), text)

        return build

    def masked_out(g: Graph) -> Link:
        return batched(g, 1.0, mask=g.add("SolidMask", value=0.0, width=64, height=64))

    plain, injected, source, edit, outside_mask = latents(
        server,
        lambda g: batched(g, 0.0),
        lambda g: batched(g, 1.0),
        single("a cat", 1.0),
        single("a red cat", 3.0),
        masked_out,
    )
    assert plain.shape[0] == 3
    assert near(plain[:1], source)
    assert near(plain[1:2], edit)
    assert near(injected[:1], source)
    assert differ(injected[1:], plain[1:])
    assert near(outside_mask, plain)


@pytest.mark.parametrize(
    ("more", "node", "message"),
    [
        ({"edits": " \n"}, "StackPrompts", "There is no prompt"),
        ({"list": "0, x"}, "InjectVitalLayers", "'x' is not a valid layer"),
        ({"layers": "vital layers"}, "InjectVitalLayers", "no layer 17"),
    ],
)
def test_invalid_graphs(server, more, node, message):
    graph = Graph()
    graph.save(batched(graph, 1.0, **more))
    result = server.run(graph)
    assert result.error["node_type"] == f"EditSliders{node}"
    assert message in result.error["exception_message"]
