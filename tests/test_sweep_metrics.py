"""Metrics of a sweep: hand-computed values, errors, and the node on a real server."""

from __future__ import annotations

import json
import math

import comfy.sd
import pytest
import torch
from support.comfy_server import PromptRejected
from support.graphs import Graph, Link
from support.tiny_models import recipe, tiny_clip_l, tiny_t5
from test_layer_analysis import vision_model

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


def gray_images(*values: float) -> torch.Tensor:
    """Uniformly gray images (len(values), 8, 8, 3)."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 8, 8, 3).clone()


# --- distances


def test_pixels():
    result = pixel_distances(gray_images(0.0, 0.1, 0.4, 0.2), source_index=1)
    assert result.adjacent == pytest.approx((0.1, 0.3, 0.2))
    assert result.skip_one == pytest.approx((0.4, 0.1))
    assert result.from_source == pytest.approx((0.1, 0, 0.3, 0.1))
    half = gray_images(0.0, 0.0)
    half[1, :4] = 0.6
    assert pixel_distances(half).adjacent == pytest.approx((0.6 * math.sqrt(0.5),))


def test_latents():
    latents = torch.zeros(3, 16, 4, 4)
    latents[1] += 0.5
    latents[2, :, :2] = 2.0
    result = latent_distances(latents, source_index=1)
    assert result.adjacent == pytest.approx((0.5, math.sqrt((1.5**2 + 0.5**2) / 2)))
    assert result.from_source == pytest.approx((0.5, 0, math.sqrt((1.5**2 + 0.5**2) / 2)))
    assert "latents" in result.metric_name


def test_features():
    """Vectors at 0, 60 and 180 degrees, of different lengths."""
    features = torch.tensor([[2.0, 0], [0.5, 0.5 * math.sqrt(3)], [-3, 0]])
    result = cosine_distances(features, "name")
    assert result.adjacent == pytest.approx((0.5, 1.5))
    assert result.skip_one == pytest.approx((2,))
    assert result.from_source == pytest.approx((0, 0.5, 2))
    assert result.path_lengths() == pytest.approx((1, math.sqrt(3)))


def test_path_lengths_of_features_are_additive():
    """1 - cosine is quadratic for small angles: two half steps sum to half of the full step."""
    angles = torch.linspace(0, 0.2, 3).double()
    path = cosine_distances(torch.stack([angles.cos(), angles.sin()], 1), "name")
    ends = cosine_distances(torch.stack([angles.cos(), angles.sin()], 1)[::2], "name")
    assert sum(path.path_lengths()) == pytest.approx(sum(ends.path_lengths()), rel=0.01)
    assert sum(path.adjacent) == pytest.approx(sum(ends.adjacent) / 2, rel=0.01)


def test_squared_distances_of_an_even_sweep_are_linear():
    """Images on a straight line, compared by a distance that is quadratic in the change, such as LPIPS."""
    values = (0.0, 0.1, 0.3, 1.0)
    adjacent, skip_one = ([(values[k + step] - values[k]) ** 2 for k in range(4 - step)] for step in (1, 2))
    squares = ImageDistances("squares", tuple(adjacent), tuple(skip_one), tuple(v**2 for v in values), squared=True)
    result = measure_sweep(values, squares)
    assert (result.path_linearity.largest, result.source_linearity.largest) == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.parametrize("kind", ["clip_vision_model", "dinov2", "siglip_vision_model"])
def test_vision_models(kind):
    images = torch.rand(10, 40, 56, 3, generator=torch.Generator().manual_seed(1))
    images[4] = images[3]
    model = vision_model(kind)
    result = feature_distances(images, model)
    assert kind in result.metric_name
    assert result.adjacent[3] == 0
    assert all(0 < distance < 2 for k, distance in enumerate(result.adjacent) if k != 3)
    first, second = (vision_features(image[None], model)[0] for image in images[8:])
    assert result.adjacent[8] == pytest.approx(1 - torch.cosine_similarity(first, second, dim=0).item(), abs=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(count):
    with pytest.raises(SliderError, match=f"The sweep has {count} image; expected at least two"):
        pixel_distances(gray_images(*[0.5] * count) if count else torch.zeros(0, 8, 8, 3))


def test_images_that_are_not_finite():
    with pytest.raises(SliderError, match="not finite"):
        pixel_distances(gray_images(0.0, math.nan))


# --- metrics


def test_linearity():
    assert linearity([0, 0.5, 1], [3, 4, 5]).largest == pytest.approx(0)
    late = linearity([0, 0.25, 1], [0, 0, 2])
    assert (late.mean, late.largest) == pytest.approx((0.25 / 3, 0.25))
    with pytest.raises(SliderError, match="last image equals the first"):
        linearity([0, 1], [2, 2])


def test_measure_sweep_by_hand():
    result = measure_sweep([0, 0.5, 1], pixel_distances(gray_images(0.0, 0.1, 0.4)))
    assert result.first_order == pytest.approx(0.75)
    assert result.delta_smooth == pytest.approx(0, abs=1e-6)
    assert result.kl_to_uniform == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert (result.path_linearity.mean, result.path_linearity.largest) == pytest.approx((0.25 / 3, 0.25))
    assert (result.source_linearity.mean, result.source_linearity.largest) == pytest.approx((0.25 / 3, 0.25))
    assert result.similarity == pytest.approx((1, 0.9, 0.6))
    content = json.loads(result.as_json())
    assert content["distances"]["adjacent"] == pytest.approx([0.1, 0.3])
    assert content["path"]["largest"] == pytest.approx(0.25)
    assert "first order 0.750" in result.report()
    assert result.report().endswith("1.000 | 0.400 | 0.600")


def test_source_is_at_strength_0():
    strengths = [-1, 0, 1]
    assert source_index_of(strengths) == 1
    result = measure_sweep(strengths, pixel_distances(gray_images(0.2, 0.4, 0.8), source_index_of(strengths)))
    assert result.distances.from_source == pytest.approx((0.2, 0, 0.4))
    assert result.source_linearity.largest == pytest.approx(1 / 2 - 1 / 3)  # -0.2, 0, 0.4 against -1, 0, 1


def test_path_and_source_linearity_of_a_detour():
    result = measure_sweep([0, 0.5, 1], pixel_distances(gray_images(0.0, 0.6, 0.4)))
    assert result.path_linearity.largest == pytest.approx(0.25)  # 0, 0.6, 0.8
    assert result.source_linearity.largest == pytest.approx(1.0)  # 0, 0.6, 0.4


def test_sweep_back_to_the_source_has_no_nan():
    result = measure_sweep([0, 0.5, 1], pixel_distances(gray_images(0.0, 0.5, 0.0)))
    assert result.delta_smooth == math.inf
    assert result.source_linearity is None
    assert "NaN" not in result.as_json()
    assert "Infinity" not in result.as_json()
    assert json.loads(result.as_json())["delta_smooth"] is None
    assert "delta_smooth inf" in result.report()


def test_two_images():
    result = measure_sweep([0, 1], pixel_distances(gray_images(0.0, 0.5)))
    assert result.delta_smooth is None
    assert result.first_order == 1


def test_errors():
    distances = pixel_distances(gray_images(0.0, 0.1, 0.4))
    with pytest.raises(SliderError, match="3 images and 2 strengths"):
        measure_sweep([0, 1], distances)
    with pytest.raises(SliderError, match=r"0, 1, 0\.5; expected ascending"):
        measure_sweep([0, 1, 0.5], distances)
    with pytest.raises(SliderError, match="All images are equal"):
        measure_sweep([0, 0.5, 1], pixel_distances(gray_images(0.3, 0.3, 0.3)))


# --- change outside the mask


def test_fraction_outside_mask():
    images = gray_images(0.0, 0.0, 0.0)
    images[1, :, :4] = 0.3  # left half
    images[2, :4] = 0.5  # upper half
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    assert fraction_outside_mask(images, left) == pytest.approx((None, 0, 0.5))
    assert fraction_outside_mask(images, 1 - left) == pytest.approx((None, 1, 0.5))
    images[2, :4, :4] = 0.1  # one quarter inside by 0.1, one quarter outside by 0.5
    assert fraction_outside_mask(images, left[0])[2] == pytest.approx(5 / 6)
    large = left.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert fraction_outside_mask(images, large)[2] == pytest.approx(5 / 6)


def test_invalid_masks():
    images = gray_images(0.0, 0.1)
    for mask, extent in ((torch.zeros(8, 8), "empty"), (torch.ones(8, 8), "the entire image")):
        with pytest.raises(SliderError, match=f"The mask is {extent}"):
            fraction_outside_mask(images, mask)
    with pytest.raises(SliderError, match="There are 2 masks; expected one"):
        fraction_outside_mask(images, torch.rand(2, 8, 8))


# --- CLIP


def clip(projection: torch.Tensor | None = None, flux: bool = False, without_projection: bool = False):
    """A tiny CLIP-L, alone as in a checkpoint or with a T5 as for FLUX.1; optionally with another text projection.

    Without a projection in the weights ComfyUI leaves its parameter uninitialized.
    """
    weights = [tiny_clip_l(), *([tiny_t5()] if flux else [])]
    if projection is not None:
        weights[0]["text_projection.weight"] = projection
    if without_projection:
        del weights[0]["text_projection.weight"]
    kind = comfy.sd.CLIPType.FLUX if flux else comfy.sd.CLIPType.STABLE_DIFFUSION
    return comfy.sd.load_text_encoder_state_dicts(weights, clip_type=kind, model_options=CONFIG)


@pytest.fixture(scope="module")
def clip_space():
    """Images, a vision model and a text projection for CLIP with which 'a photo' matches the source image."""
    images = torch.rand(4, 28, 28, 3, generator=torch.Generator().manual_seed(1))
    images[3] = images[0]
    model = vision_model("clip_vision_model", projection_dim=768)
    pooled = unprojected_embedding(clip(), "a photo")
    source_direction = torch.nn.functional.normalize(vision_features(images[:1], model)[0], dim=0)
    random = recipe.draw("projection", (768, 768), 3, 0.02)
    projection = random + 5 * source_direction[:, None] * torch.nn.functional.normalize(pooled, dim=0)
    return images, model, projection


def unprojected_embedding(clip_model, prompt: str) -> torch.Tensor:
    return clip_model.encode_from_tokens(clip_model.tokenize(prompt), return_pooled="unprojected")[1][0].float().cpu()


def test_clip_direction(clip_space):
    images, model, projection = clip_space
    clip_model = clip(projection=projection)
    result = clip_scores(images, model, clip_model, "a photo", "a drawing")
    features = vision_features(images, model)
    before, after = (projection @ unprojected_embedding(clip_model, prompt) for prompt in ("a photo", "a drawing"))
    cosine = torch.nn.functional.cosine_similarity
    for k in (1, 2):
        assert result.direction[k] == pytest.approx(
            cosine(features[k] - features[0], after - before, dim=0).item(), abs=1e-3
        )
        assert result.to_edit[k] == pytest.approx(cosine(features[k], after, dim=0).item(), abs=1e-3)
        assert result.to_source[k] == pytest.approx(cosine(features[k], before, dim=0).item(), abs=1e-3)
    assert result.direction[0] is None
    assert result.direction[3] is None
    other = clip_scores(images, model, clip_model, "a photo", "a drawing", source_index=1)
    assert other.direction[1] is None
    assert other.direction[2] != pytest.approx(result.direction[2], abs=1e-3)


def test_clip_of_flux_runs_without_t5(clip_space):
    """The scores equal those of CLIP-L alone; the output of the text encoders afterwards is unchanged."""
    images, model, projection = clip_space
    clip_l, clip_model = clip(projection), clip(projection, flux=True)
    tokens, prompts = clip_model.tokenize("a photo"), ("a photo", "a drawing")
    before, t5_calls = clip_model.encode_from_tokens(tokens, return_pooled=True), []
    hook = clip_model.cond_stage_model.t5xxl.transformer.register_forward_hook(lambda *_: t5_calls.append(1))
    result = clip_scores(images, model, clip_model, *prompts)
    assert result.direction == pytest.approx(clip_scores(images, model, clip_l, *prompts).direction, abs=1e-4)
    assert t5_calls == []
    after = clip_model.encode_from_tokens(tokens, return_pooled=True)
    assert t5_calls == [1]
    hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(before, after))


def test_text_and_images_of_different_embedding_spaces(clip_space):
    images, model, projection = clip_space
    prompts = ("a photo", "a drawing")
    valid_clip = clip(projection=projection)
    for invalid in (torch.eye(768), torch.zeros(768, 768)):
        with pytest.raises(SliderError, match="has no text_projection"):
            clip_scores(images, model, clip(projection=invalid), *prompts)
    random_projection = recipe.draw("left over", (768, 768), 5, 0.02)
    for weight, message in (
        (torch.zeros(768, 768), "has no text_projection"),
        (random_projection, "do not belong to one model"),
    ):
        unprojecting = clip(without_projection=True)
        unprojecting.cond_stage_model.clip_l.transformer.text_projection.weight.data.copy_(weight)
        with pytest.raises(SliderError, match=message):
            clip_scores(images, model, unprojecting, *prompts)
    with pytest.raises(SliderError, match="do not belong to one model"):
        clip_scores(images, model, clip(projection=-projection), *prompts)
    with pytest.raises(SliderError, match="a width of 768, the image embeddings of 16"):
        clip_scores(images, vision_model("clip_vision_model"), valid_clip, *prompts)
    for kind in ("dinov2", "siglip_vision_model"):
        with pytest.raises(SliderError, match=f"of type {kind}; only CLIP can compare text with images"):
            clip_scores(images, vision_model(kind), valid_clip, *prompts)
    with pytest.raises(SliderError, match="source_prompt and edit_prompt are the same"):
        clip_scores(images, model, valid_clip, "a photo", "a photo ")


# --- nodes


def image_batch(g: Graph, *colors: int) -> Link:
    batch = g.add("EmptyImage", width=32, height=32, batch_size=1, color=colors[0])
    for color in colors[1:]:
        image = g.add("EmptyImage", width=32, height=32, batch_size=1, color=color)
        batch = g.add("ImageBatch", image1=batch, image2=image)
    return batch


def gray_colors(*values: int) -> tuple[int, ...]:
    return tuple(value * 0x010101 for value in values)


def strength_list(g: Graph, values: str) -> Link:
    return g.add("EditSlidersStrengthList", values=values)


def test_measure_sweep_node(server):
    g = Graph()
    node, _ = g.add(
        "EditSlidersMeasureSweep", images=image_batch(g, *gray_colors(0, 51, 204)), strengths=strength_list(g, "0 .5 1")
    )
    texts = [g.add("PreviewAny", source=[node, output])[0] for output in (0, 1)]
    plot = g.add("PreviewImage", images=[node, 2])[0]
    result = server.run(g)
    assert result.ok, result.error
    assert "first order 0.750" in result.text(texts[0])
    assert json.loads(result.text(texts[1]))["distances"]["from_source"] == pytest.approx([0, 0.2, 0.8], abs=1e-4)
    assert result.images(plot)[0].size == (900, 500)


def test_nodes_compare_latents(server):
    """The distance between a latent and half of it is half of its root mean square."""

    def run(node: str, count: int, **more) -> tuple:
        g = Graph()
        half = g.add("LatentMultiply", samples=g.photo(), multiplier=0.5)
        latent = g.add("LatentBatch", samples1=g.photo(), samples2=half)
        saved_latent = g.save(g.photo())
        more = {"latent": latent, **more} if count else more
        images, strengths = (
            image_batch(g, *gray_colors(*range(count or 2))),
            strength_list(g, " ".join(map(str, range(count or 2)))),
        )
        output, _ = g.add(node, images=images, strengths=strengths, distance="latent", **more)
        text = g.add("PreviewAny", source=[output, 2 if node == "EditSlidersCalibrate" else 1])[0]
        return server.run(g), text, saved_latent

    result, text, saved_latent = run("EditSlidersMeasureSweep", 2)
    assert result.ok, result.error
    photo = result.latent(saved_latent)
    distances = json.loads(result.text(text))["distances"]
    assert distances["adjacent"] == pytest.approx([0.5 * float((photo**2).mean()) ** 0.5], rel=1e-3)
    result, text, _ = run("EditSlidersCalibrate", 2)
    assert "compared by latents" in result.text(text)
    assert "2 latents and 3 images" in run("EditSlidersMeasureSweep", 3)[0].error["exception_message"]
    assert "no latent is linked" in run("EditSlidersCalibrate", 0)[0].error["exception_message"]


def test_measure_sweep_with_mask(server):
    g = Graph()
    half = g.add("SolidMask", value=0.25, width=32, height=32)
    images, strengths = image_batch(g, *gray_colors(0, 51, 204)), strength_list(g, "0 .5 1")
    node, _ = g.add("EditSlidersMeasureSweep", images=images, strengths=strengths, mask=half)
    text = g.add("PreviewAny", source=[node, 1])[0]
    result = server.run(g)
    assert result.ok, result.error
    assert json.loads(result.text(text))["outside"] == [None, pytest.approx(0.75), pytest.approx(0.75)]


@pytest.mark.parametrize(
    ("values", "colors", "more", "message"),
    [
        ("0 .5 1", gray_colors(9, 9, 9), {}, "All images are equal"),
        ("0 1", gray_colors(0, 9, 99), {}, "3 images and 2 strengths"),
        ("0", gray_colors(0), {}, "There is one image"),
        (
            "0 1",
            gray_colors(0, 9),
            {"clip": True, "source_words": "a"},
            "expected clip_vision, source_prompt and edit_prompt",
        ),
    ],
)
def test_measure_sweep_errors(server, values, colors, more, message):
    g = Graph()
    if "clip" in more:
        more = {**more, "clip": g.clip()}
    node, _ = g.add(
        "EditSlidersMeasureSweep", images=image_batch(g, *colors), strengths=strength_list(g, values), **more
    )
    g.add("PreviewAny", source=[node, 0])
    result = server.run(g)
    assert not result.ok
    assert message in result.error["exception_message"]


def test_strengths_are_required(server):
    g = Graph()
    node, _ = g.add("EditSlidersMeasureSweep", images=image_batch(g, *gray_colors(0, 9)))
    g.add("PreviewAny", source=[node, 0])
    with pytest.raises(PromptRejected, match="strengths"):
        server.run(g)
