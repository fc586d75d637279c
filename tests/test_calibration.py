"""Calibration: curves with hand-computed results, their JSON, the useful range, and evenness of trained sliders."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.comfy_server import PromptRejected
from support.graphs import Graph
from support.outcomes import differ, latents, near
from test_miniature_sliders import ADAPTERS, it  # noqa: F401
from test_sweep_metrics import gray_colors, gray_images, image_batch, strength_list

from slider_core.errors import SliderError
from slider_core.metrics.calibration import REGRESSION_FACTOR, Calibration, calibrate, parse_calibration
from slider_core.metrics.image_distance import cosine_distances, pixel_distances
from slider_core.metrics.smoothness import delta_smooth
from slider_core.metrics.sweep_metrics import source_index_of
from training.miniature.evaluate import validation_tasks
from training.miniature.read_attributes import reached_strength, read_attributes
from training.miniature.slider_methods import METHODS

EVEN_STRENGTHS = [k / 8 for k in range(9)]
NUM_SCENES = 4


def calibrate_gray(strengths, values):
    """The calibration of a sweep of uniformly gray images."""
    return calibrate(strengths, pixel_distances(gray_images(*values).double(), source_index_of(strengths)))


# --- curves


def test_even_sweep_gives_the_identity():
    result = calibrate_gray(EVEN_STRENGTHS, [0.1 * k for k in range(9)])
    assert result.calibration.positions == pytest.approx(EVEN_STRENGTHS)
    assert result.calibration.strengths == pytest.approx(EVEN_STRENGTHS)
    assert result.calibration.strengths_at([-0.3, 0, 0.3, 1, 1.4]) == pytest.approx((-0.3, 0, 0.3, 1, 1.4))


def test_uneven_sweep_becomes_even():
    """A slider whose change grows with the cube of the strength."""
    result = calibrate_gray(EVEN_STRENGTHS, [strength**3 for strength in EVEN_STRENGTHS]).calibration
    even = np.linspace(0, 1, 11)
    assert np.abs(np.array(result.strengths_at(even)) ** 3 - even).max() < 0.06
    measured_positions = [position for position in result.positions if position > 0]
    assert np.array(result.strengths_at(measured_positions)) ** 3 == pytest.approx(
        [0.25**3 + (1 - 0.25**3) * position for position in measured_positions], abs=1e-3
    )


def test_curve_starts_at_the_first_change_and_ends_at_one():
    result = calibrate_gray([0, 0.25, 0.5, 0.75, 1], [0.2, 0.2, 0.21, 0.6, 1.0]).calibration
    assert result.strengths[0] == 0.5  # 1 % of the change below 0.5, 50 % below 0.75
    assert result.positions == pytest.approx((0, 0.4937, 1))
    assert result.strengths_at([0, 1]) == (0.5, 1)


def test_noisy_sweep():
    """The curve stays monotonic for noisy distances."""
    rng = np.random.default_rng(1)
    values = np.clip(np.linspace(0, 0.9, 17) + rng.normal(0, 0.06, 17), 0, 1)
    assert min(np.diff(values)) < 0
    result = calibrate_gray(np.linspace(0, 1, 17).tolist(), values.tolist()).calibration
    strengths = result.strengths_at(np.linspace(-0.5, 1.5, 400))
    assert all(b > a for a, b in pairwise(strengths))
    assert np.abs(np.array(result.strengths_at(EVEN_STRENGTHS)) - EVEN_STRENGTHS).max() < 0.2


def test_plateau_within_the_sweep():
    result = calibrate_gray([0, 0.25, 0.5, 0.75, 1], [0, 0.4, 0.4, 0.4, 0.8]).calibration
    assert result.positions == pytest.approx((0, 0.5, 1))
    assert result.strengths == (0, 0.25, 1)


def test_sweep_without_strengths_0_and_1():
    result = calibrate_gray([-0.3, 0.3, 0.9, 1.5], [0.1, 0.3, 0.5, 0.7]).calibration
    assert result.strengths_at([0, 0.5, 1]) == pytest.approx((0, 0.5, 1), abs=1e-3)


def test_cosine_distances_become_path_lengths():
    """An even rotation sampled in uneven steps gives the identity; 1 - cosine itself, being quadratic, would not."""
    strengths = [0, 0.1, 0.2, 0.6, 1]
    angles = torch.tensor(strengths).double() * 0.5
    result = calibrate(strengths, cosine_distances(torch.stack([angles.cos(), angles.sin()], 1), "name"))
    assert result.calibration.positions == pytest.approx(strengths, abs=1e-3)


# --- the useful range


SWEEP_ABOVE_ONE = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


@pytest.mark.parametrize(
    ("values", "end", "reason"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 1.75, "the sweep ends there"),
        ([0, 1, 2, 3, 4, 5, 9.5, 9.6], 1.25, "beyond it the image jumps"),
        ([0, 1, 2, 3, 4, 4.5, 4.51, 4.51], 1.25, "beyond it nothing changes"),
        ([0, 1, 2, 3, 4, 4.01, 6, 7], 1, "beyond it nothing changes"),
        ([0, 1, 2, 3, 4, 5, 3, 2], 1.25, "beyond it the image returns toward the source"),
    ],
)
def test_upper_limit(values, end, reason):
    result = calibrate_gray(SWEEP_ABOVE_ONE, [value / 10 for value in values])
    assert result.calibration.strengths[-1] == end
    assert result.upper_limit == reason
    assert result.calibration.strengths_at([1]) == (1,)
    assert f"(strength {end:g}; {reason})" in result.report("pixels")
    assert "Calibrated with 8 images" in result.report("pixels")


def test_regression_is_measured_in_path_lengths():
    """A rotation back to 0.93 of its angle stays above REGRESSION_FACTOR; its squared distance 1 - cosine would not."""
    angles = torch.tensor([0, 0.25, 0.5, 0.75, 1, 0.93]).double() * 0.5
    distances = cosine_distances(torch.stack([angles.cos(), angles.sin()], 1), "name")
    assert distances.from_source[5] < REGRESSION_FACTOR * distances.from_source[4]
    assert calibrate(SWEEP_ABOVE_ONE[:6], distances).calibration.strengths[-1] == 1.25


def test_lower_limit():
    result = calibrate_gray([-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1], [0, 0, 0.1, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6])
    assert result.calibration.strengths == (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1)
    assert result.calibration.positions == pytest.approx((-1, -0.6667, -0.3333, 0, 0.3333, 0.6667, 1), abs=1e-3)
    assert result.lower_limit == "beyond it nothing changes"


def test_linear_extrapolation_beyond_the_curve():
    curve = Calibration((0.0, 0.9, 1.0), (0.2, 0.4, 1.0))
    assert curve.strengths_at([1.5, 2, -1]) == pytest.approx((1.4, 1.8, -0.6))


def test_plotted_curve_passes_through_the_points():
    curve = Calibration((-0.3, 0.0, 0.77, 1.0), (-0.2, 0.1, 0.2, 1.0))
    line = curve.curve_points()
    assert {*zip(curve.positions, curve.strengths)} <= {*line}
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(line))
    assert max(c - a for (a, _), (c, _) in pairwise(line)) < 0.03


# --- JSON


def test_json_round_trip():
    result = calibrate_gray(SWEEP_ABOVE_ONE, [0, 0.013, 0.1, 0.31, 0.5, 0.61, 0.72, 0.8]).calibration
    assert parse_calibration(result.as_json()) == result
    assert len(result.as_json()) < 200
    assert set(json.loads(result.as_json())) == {"positions", "strengths"}


def test_empty_text_is_no_calibration():
    assert parse_calibration(" \n") is None


def test_interpolation_between_two_points():
    assert Calibration((0.0, 1.0), (0.5, 1.0)).strengths_at((0.0, 0.5, 2.0)) == (0.5, 0.75, 1.5)


INVALID_CURVES = [
    ("0.5, 1", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("[1, 2]", "must have exactly 'positions' and 'strengths'"),
    ('{"positions": [0, 1]}', "must have exactly 'positions' and 'strengths'"),
    ('{"positions": [0, 1], "strengths": 3}', "expected a list of at least two numbers"),
    ('{"positions": [0], "strengths": [0]}', "expected a list of at least two numbers"),
    ('{"positions": [0, 1], "strengths": [0, "1"]}', "strengths is '1'; expected a number"),
    ('{"positions": [0, 1], "strengths": [0, NaN]}', "strengths is nan; expected a number"),
    ('{"positions": [0, 1], "strengths": [0, true]}', "strengths is True; expected a number"),
    ('{"positions": [0, 1], "strengths": [1, 0]}', "expected ascending values"),
    ('{"positions": [0, 0, 1], "strengths": [0, 0.5, 1]}', "expected ascending values"),
    ('{"positions": [0, 1], "strengths": [0, 0.5, 1]}', "2 positions and 3 strengths"),
    ('{"positions": [0.2, 1], "strengths": [0, 1]}', "go from 0.2 to 1; expected 0"),
    ('{"positions": [0, 0.9], "strengths": [0, 1]}', "go from 0 to 0.9; expected 0"),
]


@pytest.mark.parametrize(("text", "message"), INVALID_CURVES)
def test_invalid_json(text, message):
    with pytest.raises(SliderError, match=message):
        parse_calibration(text)


def test_errors():
    for strengths in ([0.1, 0.5, 1], [0, 0.5, 0.9]):
        with pytest.raises(SliderError, match=f"go from {strengths[0]:g} to {strengths[-1]:g}; expected images from 0"):
            calibrate_gray(strengths, [0, 0.1, 0.2])
    with pytest.raises(SliderError, match="Nothing changes from strength 0 to 1"):
        calibrate_gray([0, 1, 2], [0.1, 0.1, 0.3])
    with pytest.raises(SliderError, match="expected ascending"):
        calibrate_gray([0, 1, 1], [0, 0.1, 0.2])
    with pytest.raises(SliderError, match="2 images and 3 strengths"):
        calibrate([0, 0.5, 1], pixel_distances(gray_images(0.0, 0.1)))
    with pytest.raises(SliderError, match="The calibrated strength is 150"):
        Calibration((0.0, 1.0), (0.0, 1.5)).strengths_at([100])


# --- trained sliders


@pytest.mark.parametrize("name", ADAPTERS)
def test_calibrated_sliders_are_even(it, name):  # noqa: F811
    """Evenness of the edited attribute after calibration with 9 images, with the same noise and with other noise."""
    result = []
    for source, edits in validation_tasks(NUM_SCENES, 1):

        def evaluate(strengths, seed="sliding", source=source, edits=edits):
            images = it.render(source, METHODS[name](it, edits, 0, strengths), len(strengths), seed)
            reached = [reached_strength(edits[0], source, read_attributes(image, source)) for image in images]
            distances = pixel_distances(torch.from_numpy(images))
            deviation = float(np.abs(np.subtract(reached, EVEN_STRENGTHS)).mean())
            return distances, (deviation, delta_smooth(distances.adjacent, distances.skip_one))

        distances, before = evaluate(EVEN_STRENGTHS)
        calibrated = calibrate(EVEN_STRENGTHS, distances).calibration.strengths_at(EVEN_STRENGTHS)
        result.append((before, evaluate(calibrated)[1], evaluate(calibrated, "other noise")[1]))
    (linear, delta), (same, same_delta), (other, other_delta) = np.mean(result, 0)
    assert same < 0.4 * linear, result
    assert other < 0.6 * linear, result
    assert same_delta + other_delta < 0.9 * 2 * delta, result


# --- nodes


def test_calibrate_and_calibrated_strength(server):
    """The curve maps positions to strengths; switched off, the node returns the position itself."""
    g = Graph()
    images, strengths = image_batch(g, *gray_colors(0, 0, 10, 110, 210)), strength_list(g, "0 .25 .5 .75 1")
    node, _ = g.add("EditSlidersCalibrate", images=images, strengths=strengths)
    previews = {name: g.add("PreviewAny", source=[node, output])[0] for name, output in (("curve", 0), ("report", 2))}
    plot = g.add("PreviewImage", images=[node, 1])[0]
    for name, inputs in {"on": {"on": True}, "off": {"on": False}, "empty": {"on": True, "curve": ""}}.items():
        inputs = {"position": 0.5, "curve": [node, 0], **inputs}
        strength = g.add("EditSlidersCalibratedStrength", 1, **inputs)
        previews[name] = g.add("PreviewAny", source=strength)[0]
    several = g.add("EditSlidersCalibratedStrength", position=strength_list(g, "0 .5 1"), curve=[node, 0], on=True)
    previews["several"] = g.add("PreviewAny", source=several)[0]
    result = server.run(g)
    assert result.ok, result.error
    text = {name: result.text(node) for name, node in previews.items()}
    curve = parse_calibration(text["curve"])
    assert curve.strengths == (0.25, 0.5, 0.75, 1)
    assert curve.positions == pytest.approx((0, 10 / 210, 110 / 210, 1), abs=1e-3)
    [middle] = curve.strengths_at([0.5])
    assert 0.7 < middle < 0.75
    assert (float(text["on"]), float(text["off"]), float(text["empty"])) == (middle, 0.5, 0.5)
    assert json.loads(text["several"].replace("(", "[").replace(")", "]")) == [0.25, middle, 1]
    assert "Calibrated with 5 images" in text["report"]
    assert "Position 0 is strength 0.25" in text["report"]
    assert result.images(plot)[0].size == (900, 500)


CURVE = '{"positions": [0, 1], "strengths": [0.4, 1]}'


def test_curve_points_for_the_page(server):
    g = Graph()
    cases = {"on": (CURVE, True), "off": (CURVE, False), "empty": ("", True), "off and none": ("no curve", False)}
    nodes = {
        name: g.add("EditSlidersCalibratedStrength", position=0.5, curve=curve, on=on)
        for name, (curve, on) in cases.items()
    }
    for node in nodes.values():
        g.add("PreviewAny", source=node)
    assert server.run(g).ok
    cached = server.run(g).outputs  # cached by ComfyUI
    assert {name: cached[node]["curve"] for name, (node, _) in nodes.items()} == {
        name: [curve] for name, (curve, _) in cases.items()
    }
    assert cached[nodes["off"][0]]["points"] == cached[nodes["empty"][0]]["points"] == [[]]
    [points] = cached[nodes["on"][0]]["points"]
    positions, strengths = zip(*points)
    assert len(points) > 50
    assert (positions[0], positions[-1]) == (0, 1)
    assert strengths == pytest.approx([0.4 + 0.6 * position for position in positions])


@pytest.mark.parametrize("output", [0, 1])
def test_every_slider_node_accepts_calibrated_strengths(server, output):
    def at(g: Graph, calibrates: bool):
        if calibrates:
            return g.add("EditSlidersCalibratedStrength", output, position=0.5, curve=CURVE, on=True)
        return 0.7

    def gst(calibrates):
        return lambda g: g.sample(g.gstlora(g.model(), at(g, calibrates)), g.edited(g.stock_text("a cat")))

    def st(calibrates):
        return lambda g: g.sample(
            g.stlora(g.model()), g.edited(g.strengths(g.instructions("a cat\na dog"), at(g, calibrates)))
        )

    def projected(calibrates):
        return lambda g: g.sample(g.projected(g.model()), g.at(g.edited(g.stock_text("a cat")), at(g, calibrates)))

    builders = [build(calibrates) for build in (gst, st, projected) for calibrates in (True, False)]
    outs = latents(server, *builders, lambda g: g.sample(g.gstlora(g.model(), 0.5), g.edited(g.stock_text("a cat"))))
    assert all(near(outs[k], outs[k + 1]) for k in (0, 2, 4))
    assert differ(outs[0], outs[-1])


def test_invalid_curve_is_rejected(server):
    g = Graph()
    g.add("PreviewAny", source=g.add("EditSlidersCalibratedStrength", position=0.5, curve="0.5, 1", on=True))
    result = server.run(g)
    assert not result.ok
    assert "The curve is not valid JSON: '0.5, 1'" in result.error["exception_message"]


def test_invalid_position_is_rejected(server):
    g = Graph()
    g.add("PreviewAny", source=g.add("EditSlidersCalibratedStrength", position="much", curve="", on=True))
    with pytest.raises(PromptRejected, match="position"):
        server.run(g)
