"""Calibration: curves worked out by hand, text that goes round, the useful range, and what it does to real sliders."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.comfy_server import PromptRejected
from support.graphs import Graph
from support.outcomes import far, latents, near
from test_miniature_sliders import ADAPTERS, it  # noqa: F401
from test_sweep_metrics import flat, grays, pictures, strengths

from slider_core.errors import SliderError
from slider_core.metrics.calibration import REGRESSION_FACTOR, Calibration, calibrate, parse_calibration
from slider_core.metrics.image_distance import cosine_distances, pixel_distances
from slider_core.metrics.smoothness import delta_smooth
from slider_core.metrics.sweep_metrics import source_index_of
from training.miniature.evaluate import validation_tasks
from training.miniature.read_attributes import reached_strength, read_attributes
from training.miniature.slider_methods import METHODS

NINE = [k / 8 for k in range(9)]
SCENES = 4


def curve_of(strengths, values):
    """Of gray pictures."""
    return calibrate(strengths, pixel_distances(flat(*values).double(), source_index_of(strengths)))


# --- curves


def test_even_changes_need_no_calibration():
    found = curve_of(NINE, [0.1 * k for k in range(9)])
    assert found.calibration.positions == pytest.approx(NINE)
    assert found.calibration.strengths == pytest.approx(NINE)
    assert found.calibration.strengths_at([-0.3, 0, 0.3, 1, 1.4]) == pytest.approx((-0.3, 0, 0.3, 1, 1.4))


def test_equal_moves_change_equally_much():
    """A slider whose pictures go with the cube of the strength."""
    found = curve_of(NINE, [strength**3 for strength in NINE]).calibration
    even = np.linspace(0, 1, 11)
    assert np.abs(np.array(found.strengths_at(even)) ** 3 - even).max() < 0.06
    known = [position for position in found.positions if position > 0]
    assert np.array(found.strengths_at(known)) ** 3 == pytest.approx(
        [0.25**3 + (1 - 0.25**3) * position for position in known], abs=1e-3
    )


def test_it_begins_where_something_changes_and_ends_at_one():
    found = curve_of([0, 0.25, 0.5, 0.75, 1], [0.2, 0.2, 0.21, 0.6, 1.0]).calibration
    assert found.strengths[0] == 0.5  # 1 % until there, 50 % at 0.75
    assert found.positions == pytest.approx((0, 0.4937, 1))
    assert found.strengths_at([0, 1]) == (0.5, 1)


def test_pictures_that_waver():
    """Noise on the way leaves the curve rising."""
    chance = np.random.default_rng(1)
    values = np.clip(np.linspace(0, 0.9, 17) + chance.normal(0, 0.06, 17), 0, 1)
    assert min(np.diff(values)) < 0
    found = curve_of(np.linspace(0, 1, 17).tolist(), values.tolist()).calibration
    places = found.strengths_at(np.linspace(-0.5, 1.5, 400))
    assert all(b > a for a, b in pairwise(places))
    assert np.abs(np.array(found.strengths_at(NINE)) - NINE).max() < 0.2


def test_a_picture_that_does_not_change_on_the_way():
    found = curve_of([0, 0.25, 0.5, 0.75, 1], [0, 0.4, 0.4, 0.4, 0.8]).calibration
    assert found.positions == pytest.approx((0, 0.5, 1))
    assert found.strengths == (0, 0.25, 1)


def test_zero_and_one_need_not_be_among_the_strengths():
    found = curve_of([-0.3, 0.3, 0.9, 1.5], [0.1, 0.3, 0.5, 0.7]).calibration
    assert found.strengths_at([0, 0.5, 1]) == pytest.approx((0, 0.5, 1), abs=1e-3)


def test_features_are_made_to_add_up():
    """An even turn of features, looked at in uneven steps, needs no calibration: 1 - cosine alone would see one."""
    places = [0, 0.1, 0.2, 0.6, 1]
    angles = torch.tensor(places).double() * 0.5
    found = calibrate(places, cosine_distances(torch.stack([angles.cos(), angles.sin()], 1), "name"))
    assert found.calibration.positions == pytest.approx(places, abs=1e-3)


# --- the useful range


UP = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


@pytest.mark.parametrize(
    ("values", "end", "why"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 1.75, "the sweep ends there"),
        ([0, 1, 2, 3, 4, 5, 9.5, 9.6], 1.25, "beyond it the image jumps"),
        ([0, 1, 2, 3, 4, 4.5, 4.51, 4.51], 1.25, "beyond it nothing changes"),
        ([0, 1, 2, 3, 4, 4.01, 6, 7], 1, "beyond it nothing changes"),
        ([0, 1, 2, 3, 4, 5, 3, 2], 1.25, "beyond it the image returns toward the source"),
    ],
)
def test_above_one(values, end, why):
    found = curve_of(UP, [value / 10 for value in values])
    assert found.calibration.strengths[-1] == end
    assert found.upper_limit == why
    assert found.calibration.strengths_at([1]) == (1,)
    assert f"(strength {end:g}; {why})" in found.report("pixels")
    assert "Calibrated with 8 images" in found.report("pixels")


def test_features_go_back_by_their_lengths():
    """A turn that goes back to 0.93 of its angle has not gone back to 0.9, though 1 - cosine, its square, has."""
    angles = torch.tensor([0, 0.25, 0.5, 0.75, 1, 0.93]).double() * 0.5
    distances = cosine_distances(torch.stack([angles.cos(), angles.sin()], 1), "name")
    assert distances.from_source[5] < REGRESSION_FACTOR * distances.from_source[4]
    assert calibrate(UP[:6], distances).calibration.strengths[-1] == 1.25


def test_below_zero():
    found = curve_of([-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1], [0, 0, 0.1, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6])
    assert found.calibration.strengths == (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1)
    assert found.calibration.positions == pytest.approx((-1, -0.6667, -0.3333, 0, 0.3333, 0.6667, 1), abs=1e-3)
    assert found.lower_limit == "beyond it nothing changes"


def test_beyond_the_curve_it_goes_on_in_a_line():
    curve = Calibration((0.0, 0.9, 1.0), (0.2, 0.4, 1.0))
    assert curve.strengths_at([1.5, 2, -1]) == pytest.approx((1.4, 1.8, -0.6))


def test_the_drawn_line_passes_through_the_points():
    curve = Calibration((-0.3, 0.0, 0.77, 1.0), (-0.2, 0.1, 0.2, 1.0))
    line = curve.curve_points()
    assert {*zip(curve.positions, curve.strengths)} <= {*line}
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(line))
    assert max(c - a for (a, _), (c, _) in pairwise(line)) < 0.03


# --- text


def test_text_goes_round():
    found = curve_of(UP, [0, 0.013, 0.1, 0.31, 0.5, 0.61, 0.72, 0.8]).calibration
    assert parse_calibration(found.as_json()) == found
    assert len(found.as_json()) < 200
    assert set(json.loads(found.as_json())) == {"positions", "strengths"}


def test_empty_text_is_no_curve():
    assert parse_calibration(" \n") is None


def test_positions_on_and_beyond_a_line():
    assert Calibration((0.0, 1.0), (0.5, 1.0)).strengths_at((0.0, 0.5, 2.0)) == (0.5, 0.75, 1.5)


BAD = [
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


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_text(text, message):
    with pytest.raises(SliderError, match=message):
        parse_calibration(text)


def test_what_cannot_be_calibrated():
    for places in ([0.1, 0.5, 1], [0, 0.5, 0.9]):
        with pytest.raises(SliderError, match=f"go from {places[0]:g} to {places[-1]:g}; expected images from 0"):
            curve_of(places, [0, 0.1, 0.2])
    with pytest.raises(SliderError, match="Nothing changes from strength 0 to 1"):
        curve_of([0, 1, 2], [0.1, 0.1, 0.3])
    with pytest.raises(SliderError, match="expected ascending"):
        curve_of([0, 1, 1], [0, 0.1, 0.2])
    with pytest.raises(SliderError, match="2 images and 3 strengths"):
        calibrate([0, 0.5, 1], pixel_distances(flat(0.0, 0.1)))
    with pytest.raises(SliderError, match="The calibrated strength is 150"):
        Calibration((0.0, 1.0), (0.0, 1.5)).strengths_at([100])


# --- real sliders


@pytest.mark.parametrize("name", ADAPTERS)
def test_sliders_become_even(it, name):  # noqa: F811
    """By 9 pictures of strengths 0 to 1; measured in what the pictures show, from the same and from other noise."""
    found = []
    for source, edits in validation_tasks(SCENES, 1):

        def judged(places, seed="sliding", source=source, edits=edits):
            shown = it.render(source, METHODS[name](it, edits, 0, places), len(places), seed)
            reached = [reached_strength(edits[0], source, read_attributes(picture, source)) for picture in shown]
            distances = pixel_distances(torch.from_numpy(shown))
            off = float(np.abs(np.subtract(reached, NINE)).mean())
            return distances, (off, delta_smooth(distances.adjacent, distances.skip_one))

        distances, before = judged(NINE)
        own = calibrate(NINE, distances).calibration.strengths_at(NINE)
        found.append((before, judged(own)[1], judged(own, "other noise")[1]))
    (linear, delta), (same, same_delta), (other, other_delta) = np.mean(found, 0)
    assert same < 0.4 * linear, found
    assert other < 0.6 * linear, found
    assert same_delta + other_delta < 0.9 * 2 * delta, found


# --- nodes


def test_calibrate_and_use(server):
    """The curve reaches the strength of a slider, and 'off' passes the position on."""
    g = Graph()
    images, listed = pictures(g, *grays(0, 0, 10, 110, 210)), strengths(g, "0 .25 .5 .75 1")
    node, _ = g.add("EditSlidersCalibrate", images=images, strengths=listed)
    shown = {name: g.add("PreviewAny", source=[node, output])[0] for name, output in (("curve", 0), ("report", 2))}
    plot = g.add("PreviewImage", images=[node, 1])[0]
    for name, inputs in {"on": {"on": True}, "off": {"on": False}, "empty": {"on": True, "curve": ""}}.items():
        inputs = {"position": 0.5, "curve": [node, 0], **inputs}
        strength = g.add("EditSlidersCalibratedStrength", 1, **inputs)
        shown[name] = g.add("PreviewAny", source=strength)[0]
    several = g.add("EditSlidersCalibratedStrength", position=strengths(g, "0 .5 1"), curve=[node, 0], on=True)
    shown["several"] = g.add("PreviewAny", source=several)[0]
    result = server.run(g)
    assert result.ok, result.error
    text = {name: result.text(node) for name, node in shown.items()}
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


def test_what_the_page_draws(server):
    g = Graph()
    cases = {"on": (CURVE, True), "off": (CURVE, False), "empty": ("", True), "off and none": ("no curve", False)}
    nodes = {
        name: g.add("EditSlidersCalibratedStrength", position=0.5, curve=curve, on=on)
        for name, (curve, on) in cases.items()
    }
    for node in nodes.values():
        g.add("PreviewAny", source=node)
    assert server.run(g).ok
    given = server.run(g).outputs  # from ComfyUI's memory
    assert {name: given[node]["curve"] for name, (node, _) in nodes.items()} == {
        name: [curve] for name, (curve, _) in cases.items()
    }
    assert given[nodes["off"][0]]["points"] == given[nodes["empty"][0]]["points"] == [[]]
    [points] = given[nodes["on"][0]]["points"]
    positions, strengths = zip(*points)
    assert len(points) > 50
    assert (positions[0], positions[-1]) == (0, 1)
    assert strengths == pytest.approx([0.4 + 0.6 * position for position in positions])


@pytest.mark.parametrize("output", [0, 1])
def test_every_kind_of_slider_takes_it(server, output):
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

    parts = [part(calibrates) for part in (gst, st, projected) for calibrates in (True, False)]
    outs = latents(server, *parts, lambda g: g.sample(g.gstlora(g.model(), 0.5), g.edited(g.stock_text("a cat"))))
    assert all(near(outs[k], outs[k + 1]) for k in (0, 2, 4))
    assert far(outs[0], outs[-1])


def test_a_bad_curve_is_named(server):
    g = Graph()
    g.add("PreviewAny", source=g.add("EditSlidersCalibratedStrength", position=0.5, curve="0.5, 1", on=True))
    result = server.run(g)
    assert not result.ok
    assert "The curve is not valid JSON: '0.5, 1'" in result.error["exception_message"]


def test_a_bad_position_is_refused(server):
    g = Graph()
    g.add("PreviewAny", source=g.add("EditSlidersCalibratedStrength", position="much", curve="", on=True))
    with pytest.raises(PromptRejected, match="position"):
        server.run(g)
