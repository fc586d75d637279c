"""What is measured of a sweep: numbers worked out by hand, honest refusals, and the node on a real server."""

from __future__ import annotations

import json
import math

import comfy.sd
import pytest
import torch
from support.comfy_server import PromptRejected
from support.graphs import Graph, Link
from support.tiny_models import recipe, tiny_clip_l, tiny_t5
from test_layer_analysis import vision

from slider_core.errors import SliderError
from slider_core.metrics.clip_direction import clip_scores
from slider_core.metrics.image_distance import (
    ImageDistances,
    cosine_distances,
    feature_distances,
    fraction_outside_mask,
    latent_distances,
    pixel_distances,
)
from slider_core.metrics.sweep_metrics import linearity, measure_sweep, source_index_of
from slider_core.vision_features import vision_features

CONFIG = {
    "model_config": {"num_hidden_layers": 2, "intermediate_size": 256},
    "t5xxl_model_config": {"d_model": 64, "d_ff": 128, "num_heads": 1, "num_layers": 2},
}


def flat(*values: float) -> torch.Tensor:
    """A picture of one gray per value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 8, 8, 3).clone()


# --- distances


def test_pixels():
    found = pixel_distances(flat(0.0, 0.1, 0.4, 0.2), source_index=1)
    assert found.adjacent == pytest.approx((0.1, 0.3, 0.2))
    assert found.skip_one == pytest.approx((0.4, 0.1))
    assert found.from_source == pytest.approx((0.1, 0, 0.3, 0.1))
    half = flat(0.0, 0.0)
    half[1, :4] = 0.6
    assert pixel_distances(half).adjacent == pytest.approx((0.6 * math.sqrt(0.5),))


def test_latents():
    latents = torch.zeros(3, 16, 4, 4)
    latents[1] += 0.5
    latents[2, :, :2] = 2.0
    found = latent_distances(latents, source_index=1)
    assert found.adjacent == pytest.approx((0.5, math.sqrt((1.5**2 + 0.5**2) / 2)))
    assert found.from_source == pytest.approx((0.5, 0, math.sqrt((1.5**2 + 0.5**2) / 2)))
    assert "latents" in found.metric_name


def test_features():
    """Directions at 0, 60 and 180 degrees, of different lengths."""
    features = torch.tensor([[2.0, 0], [0.5, 0.5 * math.sqrt(3)], [-3, 0]])
    found = cosine_distances(features, "name")
    assert found.adjacent == pytest.approx((0.5, 1.5))
    assert found.skip_one == pytest.approx((2,))
    assert found.from_source == pytest.approx((0, 0.5, 2))
    assert found.path_lengths() == pytest.approx((1, math.sqrt(3)))


def test_lengths_of_features_add_up_along_a_path():
    """1 - cosine does not: two small steps are half of the one."""
    angles = torch.linspace(0, 0.2, 3).double()
    whole = cosine_distances(torch.stack([angles.cos(), angles.sin()], 1), "name")
    ends = cosine_distances(torch.stack([angles.cos(), angles.sin()], 1)[::2], "name")
    assert sum(whole.path_lengths()) == pytest.approx(sum(ends.path_lengths()), rel=0.01)
    assert sum(whole.adjacent) == pytest.approx(sum(ends.adjacent) / 2, rel=0.01)


def test_steady_squares_are_linear():
    """What grows with the square of the change, as LPIPS does: pictures on a straight line, as far as they say."""
    values = (0.0, 0.1, 0.3, 1.0)
    adjacent, skipping = ([(values[k + by] - values[k]) ** 2 for k in range(4 - by)] for by in (1, 2))
    squares = ImageDistances("squares", tuple(adjacent), tuple(skipping), tuple(v**2 for v in values), squared=True)
    found = measure_sweep(values, squares)
    assert (found.path_linearity.largest, found.source_linearity.largest) == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.parametrize("kind", ["clip_vision_model", "dinov2", "siglip_vision_model"])
def test_vision_models(kind):
    pictures = torch.rand(10, 40, 56, 3, generator=torch.Generator().manual_seed(1))
    pictures[4] = pictures[3]
    model = vision(kind)
    found = feature_distances(pictures, model)
    assert kind in found.metric_name
    assert found.adjacent[3] == 0
    assert all(0 < distance < 2 for k, distance in enumerate(found.adjacent) if k != 3)
    one, other = (vision_features(picture[None], model)[0] for picture in pictures[8:])
    assert found.adjacent[8] == pytest.approx(1 - torch.cosine_similarity(one, other, dim=0).item(), abs=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures(count):
    with pytest.raises(SliderError, match=f"The sweep has {count} image; expected at least two"):
        pixel_distances(flat(*[0.5] * count) if count else torch.zeros(0, 8, 8, 3))


def test_pictures_that_are_not_finite():
    with pytest.raises(SliderError, match="not finite"):
        pixel_distances(flat(0.0, math.nan))


# --- measures


def test_linearity():
    assert linearity([0, 0.5, 1], [3, 4, 5]).largest == pytest.approx(0)
    late = linearity([0, 0.25, 1], [0, 0, 2])
    assert (late.mean, late.largest) == pytest.approx((0.25 / 3, 0.25))
    with pytest.raises(SliderError, match="last image equals the first"):
        linearity([0, 1], [2, 2])


def test_a_sweep():
    found = measure_sweep([0, 0.5, 1], pixel_distances(flat(0.0, 0.1, 0.4)))
    assert found.first_order == pytest.approx(0.75)
    assert found.delta_smooth == pytest.approx(0, abs=1e-6)
    assert found.kl_to_uniform == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert (found.path_linearity.mean, found.path_linearity.largest) == pytest.approx((0.25 / 3, 0.25))
    assert (found.source_linearity.mean, found.source_linearity.largest) == pytest.approx((0.25 / 3, 0.25))
    assert found.similarity == pytest.approx((1, 0.9, 0.6))
    content = json.loads(found.as_json())
    assert content["distances"]["adjacent"] == pytest.approx([0.1, 0.3])
    assert content["path"]["largest"] == pytest.approx(0.25)
    assert "first order 0.750" in found.report()
    assert found.report().endswith("1.000 | 0.400 | 0.600")


def test_the_source_is_at_strength_0():
    strengths = [-1, 0, 1]
    assert source_index_of(strengths) == 1
    found = measure_sweep(strengths, pixel_distances(flat(0.2, 0.4, 0.8), source_index_of(strengths)))
    assert found.distances.from_source == pytest.approx((0.2, 0, 0.4))
    assert found.source_linearity.largest == pytest.approx(1 / 2 - 1 / 3)  # -0.2, 0, 0.4 against -1, 0, 1


def test_a_detour_tells_path_and_direct_apart():
    found = measure_sweep([0, 0.5, 1], pixel_distances(flat(0.0, 0.6, 0.4)))
    assert found.path_linearity.largest == pytest.approx(0.25)  # 0, 0.6, 0.8
    assert found.source_linearity.largest == pytest.approx(1.0)  # 0, 0.6, 0.4


def test_pictures_that_come_back_are_no_nan():
    found = measure_sweep([0, 0.5, 1], pixel_distances(flat(0.0, 0.5, 0.0)))
    assert found.delta_smooth == math.inf
    assert found.source_linearity is None
    assert "NaN" not in found.as_json()
    assert "Infinity" not in found.as_json()
    assert json.loads(found.as_json())["delta_smooth"] is None
    assert "delta_smooth inf" in found.report()


def test_two_pictures():
    found = measure_sweep([0, 1], pixel_distances(flat(0.0, 0.5)))
    assert found.delta_smooth is None
    assert found.first_order == 1


def test_what_cannot_be_measured():
    distances = pixel_distances(flat(0.0, 0.1, 0.4))
    with pytest.raises(SliderError, match="3 images and 2 strengths"):
        measure_sweep([0, 1], distances)
    with pytest.raises(SliderError, match=r"0, 1, 0\.5; expected ascending"):
        measure_sweep([0, 1, 0.5], distances)
    with pytest.raises(SliderError, match="All images are equal"):
        measure_sweep([0, 0.5, 1], pixel_distances(flat(0.3, 0.3, 0.3)))


# --- change outside of a region


def test_fraction_outside_mask():
    pictures = flat(0.0, 0.0, 0.0)
    pictures[1, :, :4] = 0.3  # left half
    pictures[2, :4] = 0.5  # upper half
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    assert fraction_outside_mask(pictures, left) == pytest.approx((None, 0, 0.5))
    assert fraction_outside_mask(pictures, 1 - left) == pytest.approx((None, 1, 0.5))
    pictures[2, :4, :4] = 0.1  # a quarter inside by 0.1, one outside by 0.5
    assert fraction_outside_mask(pictures, left[0])[2] == pytest.approx(5 / 6)
    large = left.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert fraction_outside_mask(pictures, large)[2] == pytest.approx(5 / 6)


def test_bad_regions():
    pictures = flat(0.0, 0.1)
    for region, words in ((torch.zeros(8, 8), "empty"), (torch.ones(8, 8), "the entire image")):
        with pytest.raises(SliderError, match=f"The mask is {words}"):
            fraction_outside_mask(pictures, region)
    with pytest.raises(SliderError, match="There are 2 masks; expected one"):
        fraction_outside_mask(pictures, torch.rand(2, 8, 8))


# --- pictures and words


def clip(projection: torch.Tensor | None = None, flux: bool = False, without_projection: bool = False):
    """A tiny CLIP-L, alone as a checkpoint's or with a T5 as FLUX.1's; its own projection or another.

    Without a projection ComfyUI leaves in it what the memory held before, which can be anything.
    """
    weights = [tiny_clip_l(), *([tiny_t5()] if flux else [])]
    if projection is not None:
        weights[0]["text_projection.weight"] = projection
    if without_projection:
        del weights[0]["text_projection.weight"]
    kind = comfy.sd.CLIPType.FLUX if flux else comfy.sd.CLIPType.STABLE_DIFFUSION
    return comfy.sd.load_text_encoder_state_dicts(weights, clip_type=kind, model_options=CONFIG)


@pytest.fixture(scope="module")
def one_space():
    """Pictures, a vision model and a CLIP of one space: the source's words lie near the source."""
    pictures = torch.rand(4, 28, 28, 3, generator=torch.Generator().manual_seed(1))
    pictures[3] = pictures[0]
    model = vision("clip_vision_model", projection_dim=768)
    pooled = unprojected(clip(), "a photo")
    towards = torch.nn.functional.normalize(vision_features(pictures[:1], model)[0], dim=0)
    random = recipe.draw("projection", (768, 768), 3, 0.02)
    projection = random + 5 * towards[:, None] * torch.nn.functional.normalize(pooled, dim=0)
    return pictures, model, projection


def unprojected(it, words: str) -> torch.Tensor:
    return it.encode_from_tokens(it.tokenize(words), return_pooled="unprojected")[1][0].float().cpu()


def test_clip_direction(one_space):
    pictures, model, projection = one_space
    it = clip(projection=projection)
    found = clip_scores(pictures, model, it, "a photo", "a drawing")
    seen = vision_features(pictures, model)
    before, after = (projection @ unprojected(it, words) for words in ("a photo", "a drawing"))
    cosine = torch.nn.functional.cosine_similarity
    for k in (1, 2):
        assert found.direction[k] == pytest.approx(cosine(seen[k] - seen[0], after - before, dim=0).item(), abs=1e-3)
        assert found.to_edit[k] == pytest.approx(cosine(seen[k], after, dim=0).item(), abs=1e-3)
        assert found.to_source[k] == pytest.approx(cosine(seen[k], before, dim=0).item(), abs=1e-3)
    assert found.direction[0] is None
    assert found.direction[3] is None
    other = clip_scores(pictures, model, it, "a photo", "a drawing", source_index=1)
    assert other.direction[1] is None
    assert other.direction[2] != pytest.approx(found.direction[2], abs=1e-3)


def test_clip_of_flux_is_asked_without_t5(one_space):
    """The same numbers as by CLIP-L alone; what its text encoders give afterwards is as before."""
    pictures, model, projection = one_space
    alone, it = clip(projection), clip(projection, flux=True)
    tokens, words = it.tokenize("a photo"), ("a photo", "a drawing")
    before, asked = it.encode_from_tokens(tokens, return_pooled=True), []
    hook = it.cond_stage_model.t5xxl.transformer.register_forward_hook(lambda *_: asked.append(1))
    found = clip_scores(pictures, model, it, *words)
    assert found.direction == pytest.approx(clip_scores(pictures, model, alone, *words).direction, abs=1e-4)
    assert asked == []
    after = it.encode_from_tokens(tokens, return_pooled=True)
    assert asked == [1]
    hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(before, after))


def test_words_that_have_no_space_in_common_with_pictures(one_space):
    pictures, model, projection = one_space
    words = ("a photo", "a drawing")
    good = clip(projection=projection)
    for bad in (torch.eye(768), torch.zeros(768, 768)):
        with pytest.raises(SliderError, match="has no text_projection"):
            clip_scores(pictures, model, clip(projection=bad), *words)
    left_over = recipe.draw("left over", (768, 768), 5, 0.02)
    for memory, why in ((torch.zeros(768, 768), "has no text_projection"), (left_over, "do not belong to one model")):
        bare = clip(without_projection=True)
        bare.cond_stage_model.clip_l.transformer.text_projection.weight.data.copy_(memory)
        with pytest.raises(SliderError, match=why):
            clip_scores(pictures, model, bare, *words)
    with pytest.raises(SliderError, match="do not belong to one model"):
        clip_scores(pictures, model, clip(projection=-projection), *words)
    with pytest.raises(SliderError, match="a width of 768, the image embeddings of 16"):
        clip_scores(pictures, vision("clip_vision_model"), good, *words)
    for kind in ("dinov2", "siglip_vision_model"):
        with pytest.raises(SliderError, match=f"of type {kind}; only CLIP can compare text with images"):
            clip_scores(pictures, vision(kind), good, *words)
    with pytest.raises(SliderError, match="source_prompt and edit_prompt are the same"):
        clip_scores(pictures, model, good, "a photo", "a photo ")


# --- the node


def pictures(g: Graph, *colours: int) -> Link:
    batch = g.add("EmptyImage", width=32, height=32, batch_size=1, color=colours[0])
    for colour in colours[1:]:
        one = g.add("EmptyImage", width=32, height=32, batch_size=1, color=colour)
        batch = g.add("ImageBatch", image1=batch, image2=one)
    return batch


def grays(*values: int) -> tuple[int, ...]:
    return tuple(value * 0x010101 for value in values)


def strengths(g: Graph, values: str) -> Link:
    return g.add("EditSlidersStrengthList", values=values)


def test_measure_sweep(server):
    g = Graph()
    node, _ = g.add("EditSlidersMeasureSweep", images=pictures(g, *grays(0, 51, 204)), strengths=strengths(g, "0 .5 1"))
    texts = [g.add("PreviewAny", source=[node, output])[0] for output in (0, 1)]
    plot = g.add("PreviewImage", images=[node, 2])[0]
    result = server.run(g)
    assert result.ok, result.error
    assert "first order 0.750" in result.text(texts[0])
    assert json.loads(result.text(texts[1]))["distances"]["from_source"] == pytest.approx([0, 0.2, 0.8], abs=1e-4)
    assert result.images(plot)[0].size == (900, 500)


def test_nodes_compare_latents(server):
    """A latent and half of it: apart by half of its root mean square."""

    def run(node: str, count: int, **more) -> tuple:
        g = Graph()
        half = g.add("LatentMultiply", samples=g.photo(), multiplier=0.5)
        latent = g.add("LatentBatch", samples1=g.photo(), samples2=half)
        kept = g.save(g.photo())
        more = {"latent": latent, **more} if count else more
        images, listed = pictures(g, *grays(*range(count or 2))), strengths(g, " ".join(map(str, range(count or 2))))
        made, _ = g.add(node, images=images, strengths=listed, distance="latent", **more)
        text = g.add("PreviewAny", source=[made, 2 if node == "EditSlidersCalibrate" else 1])[0]
        return server.run(g), text, kept

    result, text, kept = run("EditSlidersMeasureSweep", 2)
    assert result.ok, result.error
    photo = result.latent(kept)
    distances = json.loads(result.text(text))["distances"]
    assert distances["adjacent"] == pytest.approx([0.5 * float((photo**2).mean()) ** 0.5], rel=1e-3)
    result, text, _ = run("EditSlidersCalibrate", 2)
    assert "compared by latents" in result.text(text)
    assert "2 latents and 3 images" in run("EditSlidersMeasureSweep", 3)[0].error["exception_message"]
    assert "no latent is linked" in run("EditSlidersCalibrate", 0)[0].error["exception_message"]


def test_measure_sweep_with_a_mask(server):
    g = Graph()
    half = g.add("SolidMask", value=0.25, width=32, height=32)
    images, listed = pictures(g, *grays(0, 51, 204)), strengths(g, "0 .5 1")
    node, _ = g.add("EditSlidersMeasureSweep", images=images, strengths=listed, mask=half)
    text = g.add("PreviewAny", source=[node, 1])[0]
    result = server.run(g)
    assert result.ok, result.error
    assert json.loads(result.text(text))["outside"] == [None, pytest.approx(0.75), pytest.approx(0.75)]


@pytest.mark.parametrize(
    ("values", "colours", "more", "message"),
    [
        ("0 .5 1", grays(9, 9, 9), {}, "All images are equal"),
        ("0 1", grays(0, 9, 99), {}, "3 images and 2 strengths"),
        ("0", grays(0), {}, "There is one image"),
        (
            "0 1",
            grays(0, 9),
            {"clip": True, "source_words": "a"},
            "expected clip_vision, source_prompt and edit_prompt",
        ),
    ],
)
def test_measure_sweep_says_what_is_wrong(server, values, colours, more, message):
    g = Graph()
    if "clip" in more:
        more = {**more, "clip": g.clip()}
    node, _ = g.add("EditSlidersMeasureSweep", images=pictures(g, *colours), strengths=strengths(g, values), **more)
    g.add("PreviewAny", source=[node, 0])
    result = server.run(g)
    assert not result.ok
    assert message in result.error["exception_message"]


def test_strengths_are_needed(server):
    g = Graph()
    node, _ = g.add("EditSlidersMeasureSweep", images=pictures(g, *grays(0, 9)))
    g.add("PreviewAny", source=[node, 0])
    with pytest.raises(PromptRejected, match="strengths"):
        server.run(g)
