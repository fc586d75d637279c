"""The world made by code: what is drawn is read back, true edits are told from wrong ones, and chance is by seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
import torch
from comfy.text_encoders.flux import FluxTokenizer

from slider_core.text.instructions import SEPARATOR
from training.errors import TrainingError
from training.miniature.edits import (
    FACTORS,
    HELD_OUT_SEEDS,
    LEAST_CONTRAST,
    MOST_AT_ONCE,
    STRENGTHS,
    TRAINING_SEEDS,
    VISIBLE_COLOUR,
    Edit,
    apply,
    edits,
    fits,
    legible,
    task,
)
from training.miniature.read_attributes import (
    COLOUR_TOLERANCE,
    SIZE_TOLERANCE,
    as_wanted,
    beside_path,
    deviations,
    drift,
    edit_reached,
    measured,
)
from training.miniature.synthetic_scenes import (
    APART,
    COLOUR_OF,
    COLOURS,
    GROWTH,
    JITTER,
    SIDE,
    SIZE_OF,
    SMALLEST,
    TONES,
    Scene,
    coverage,
    drawn,
    gap,
    numbers,
    picture_of,
    scene,
)
from training.rng import generator

TASKS = [task(seed) for seed in range(200)]
SCENE = Scene(
    circle_colour=COLOURS["blue"],
    square_colour=COLOURS["green"],
    background=TONES["dark"],
    circle_size=7.0,
    square_size=6.5,
    circle_centre=(20.3, 18.6),
    square_centre=(45.1, 44.8),
)
CIRCLE_RED = Edit("make the circle red", "circle_colour", COLOURS["red"])
SQUARE_RED = Edit("make the square red", "square_colour", COLOURS["red"])
CIRCLE_BIGGER = Edit("make the circle bigger", "circle_size", FACTORS["bigger"])
SQUARE_SMALLER = Edit("make the square smaller", "square_size", FACTORS["smaller"])
BRIGHT = Edit("make the background bright", "background", TONES["bright"])
EACH = [CIRCLE_RED, SQUARE_RED, CIRCLE_BIGGER, SQUARE_SMALLER, BRIGHT]


def blurred(picture):
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    half = torch.nn.functional.avg_pool2d(pixels, 2)
    return torch.nn.functional.interpolate(half, scale_factor=2, mode="bilinear")[0].permute(1, 2, 0).numpy()


def noisy(picture, seed=0):
    return picture + np.random.default_rng(seed).normal(0, 0.03, picture.shape).astype(np.float32)


def edited(number):
    """A task, strengths for it from -0.5 to 1.5, often at the ends, and the true result."""
    source, asked = TASKS[number]
    chance = np.random.default_rng(number)
    strengths = chance.choice([*STRENGTHS, *chance.uniform(*STRENGTHS, 2)], len(asked))
    return source, asked, strengths, apply(source, asked, strengths)


def colour_error(true, found):
    return max(np.linalg.norm(numbers(true, one) - numbers(found, one)) for one in (*COLOUR_OF.values(), "background"))


def size_error(true, found):
    return max(abs(numbers(true, one) - numbers(found, one)).item() for one in SIZE_OF.values())


def test_objects_keep_apart_and_inside():
    for source, _ in TASKS:
        assert gap(source, GROWTH) >= APART
        grown = replace(source, circle_size=source.circle_size * GROWTH, square_size=source.square_size * GROWTH)
        circle = coverage(grown, "circle") > 0
        square = coverage(grown, "square") > 0
        assert not (circle & square).any()
        for covered in (circle, square):
            assert not np.concatenate([covered[0], covered[-1], covered[:, 0], covered[:, -1]]).any()


def test_gap():
    assert gap(SCENE) == pytest.approx(18.6 - 7)
    assert gap(SCENE, 1.5) == pytest.approx(18.6 - 10.5)
    assert gap(replace(SCENE, circle_centre=(6.0, 18.6))) == pytest.approx(-1)
    assert gap(replace(SCENE, circle_centre=(45.1, 30.8))) == pytest.approx(0.5)
    assert gap(replace(SCENE, circle_centre=(32.6, 30.3))) == pytest.approx(np.hypot(6, 8) - 7)


def test_picture():
    picture = drawn(SCENE)
    assert (picture.shape, picture.dtype) == ((SIDE, SIDE, 3), np.float32)
    assert picture[18, 20] == pytest.approx(COLOURS["blue"])
    assert picture[44, 45] == pytest.approx(COLOURS["green"])
    assert picture[44, 20] == pytest.approx(TONES["dark"])
    shown = np.asarray(picture_of(SCENE), np.float32) / 255
    assert np.abs(shown - picture).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("size", [2.0, 3.7, 7.0, 14.0])
def test_covered_area(size):
    """Within 1% of the true area; a square's is exact."""
    scene = replace(SCENE, circle_size=size, square_size=size)
    assert coverage(scene, "square").sum() == pytest.approx(4 * size**2, rel=1e-9)
    assert coverage(scene, "circle").sum() == pytest.approx(np.pi * size**2, rel=0.04 if size < 3 else 0.01)


def test_colours_differ():
    """Between objects, and between objects and backgrounds, more than an edit must change at least."""
    for one, other in combinations(COLOURS.values(), 2):
        assert np.subtract(one, other) @ np.subtract(one, other) >= 0.45**2
    for source, _ in TASKS:
        assert np.linalg.norm(np.subtract(source.circle_colour, source.square_colour)) >= 0.38
        for colour in (source.circle_colour, source.square_colour):
            assert np.linalg.norm(np.subtract(colour, source.background)) >= VISIBLE_COLOUR


def test_paths():
    assert all(edit.at(SCENE, 0) == SCENE for edit in EACH)
    assert CIRCLE_RED.at(SCENE, 1) == replace(SCENE, circle_colour=COLOURS["red"])
    assert CIRCLE_RED.at(SCENE, 0.5).circle_colour == pytest.approx((0.5, 0.27, 0.5))
    assert CIRCLE_BIGGER.at(SCENE, 1.5).circle_size == pytest.approx(7 * 1.75)
    assert CIRCLE_BIGGER.at(SCENE, -0.5).circle_size == pytest.approx(7 * 0.75)
    assert SQUARE_SMALLER.at(SCENE, 1).square_size == pytest.approx(6.5 * 2 / 3)
    assert CIRCLE_BIGGER.at(SCENE, 9).circle_size == 7 * GROWTH
    assert SQUARE_SMALLER.at(SCENE, 9).square_size == SMALLEST
    assert CIRCLE_RED.at(SCENE, 9).circle_colour == (1, 0.27, 0)
    assert CIRCLE_RED.at(SCENE, -9).circle_colour == (0, 0.27, 1)


def test_paths_are_straight_where_models_are_asked():
    for source, asked in TASKS:
        for edit in asked:
            values = [numbers(edit.at(source, strength), edit.attribute) for strength in np.linspace(*STRENGTHS, 5)]
            steps = np.diff(values, axis=0)
            assert np.abs(steps - steps[0]).max() < 1e-9


def test_edits_together():
    strengths = [0.3, 1.2, -0.5, 0.8, 1.0]
    results = {
        apply(SCENE, [EACH[k] for k in order], [strengths[k] for k in order]) for order in permutations(range(5))
    }
    assert len(results) == 1
    [result] = results
    for edit, strength in zip(EACH, strengths):
        assert numbers(result, edit.attribute) == pytest.approx(numbers(edit.at(SCENE, strength), edit.attribute))
    contrary = [CIRCLE_BIGGER, replace(CIRCLE_BIGGER, full=FACTORS["smaller"])]
    with pytest.raises(TrainingError, match="the same thing twice"):
        apply(SCENE, contrary, [1, 1])
    with pytest.raises(TrainingError, match="2 edits need as many strengths; found 1"):
        apply(SCENE, [CIRCLE_RED, SQUARE_RED], [1])


def test_drawn_edits_are_visible_and_fit_together():
    for source, asked in TASKS:
        assert len({edit.attribute for edit in asked}) == len(asked)
        for edit in asked:
            change = np.linalg.norm(numbers(edit.at(source, 1), edit.attribute) - numbers(source, edit.attribute))
            if edit.attribute in SIZE_OF.values():
                assert change >= 0.3 * numbers(source, edit.attribute).item()
            else:
                assert change >= VISIBLE_COLOUR
        for strengths in np.random.default_rng(0).uniform(*STRENGTHS, (20, len(asked))):
            result = apply(source, asked, strengths)
            for colour in (result.circle_colour, result.square_colour):
                assert np.linalg.norm(np.subtract(colour, result.background)) >= LEAST_CONTRAST - 0.01


def test_what_cannot_be_seen_is_not_asked():
    cyan_on_gray = replace(SCENE, circle_colour=COLOURS["cyan"], background=TONES["gray"])
    assert not legible(cyan_on_gray, [CIRCLE_RED])
    assert legible(cyan_on_gray, [SQUARE_RED])
    asked = [edits(generator(seed), cyan_on_gray, 3) for seed in range(100)]
    words = {edit.instruction for some in asked for edit in some}
    assert not any("circle" in one and one.endswith(("red", "cyan")) for one in words)
    assert any("circle" in one and one.endswith("blue") for one in words)
    assert not any("square" in one and one.endswith("green") for one in words)
    assert not any("background" in one and one.endswith("gray") for one in words)


def test_edits_of_another_scene():
    cyan_on_gray = replace(SCENE, circle_colour=COLOURS["cyan"], background=TONES["gray"])
    assert [fits(cyan_on_gray, edit) for edit in EACH] == [False, True, True, True, True]
    assert [fits(CIRCLE_RED.at(SCENE, 1), edit) for edit in EACH] == [False, True, True, True, True]
    assert all(fits(SCENE, edit) for edit in EACH)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_edits_as_asked(count):
    for seed in range(100):
        chance = generator(seed)
        assert len(edits(chance, scene(chance), count)) == count


def test_three_edits_fit_any_colours():
    for (circle, square), tone in product(permutations(COLOURS.values(), 2), TONES.values()):
        source = replace(SCENE, circle_colour=circle, square_colour=square, background=tone)
        assert len(edits(generator(0), source, 3)) == 3


@pytest.mark.parametrize("count", [0, MOST_AT_ONCE + 1])
def test_too_few_or_many_edits(count):
    with pytest.raises(TrainingError, match=f"{count} edits were asked for"):
        edits(generator(0), SCENE, count)


def test_variety():
    assert {len(asked) for _, asked in TASKS} == {1, 2, 3}
    every = [edit for seed in range(200, 700) for edit in task(seed).edits] + [e for _, asked in TASKS for e in asked]
    kinds = Counter((edit.attribute, edit.full) for edit in every)
    assert len(kinds) == 2 * (len(COLOURS) + len(FACTORS)) + len(TONES)
    shares = Counter(edit.attribute for edit in every)
    assert max(shares.values()) < 1.4 * min(shares.values())
    for kind in kinds:
        assert len({edit.instruction for edit in every if (edit.attribute, edit.full) == kind}) >= 4


def test_words():
    meanings = {}
    tokenizer = FluxTokenizer()
    for _, asked in TASKS:
        for edit in asked:
            assert SEPARATOR not in edit.instruction
            assert meanings.setdefault(edit.instruction, (edit.attribute, edit.full)) == (edit.attribute, edit.full)
    for words in meanings:
        tokens = tokenizer.tokenize_with_weights(words)
        assert sum(token != 0 for token, *_ in tokens["t5xxl"][0]) <= 8
    some = next(task for task in TASKS if len(task.edits) == 2)
    assert some.prompt == f"{some.edits[0].instruction} and {some.edits[1].instruction}"


def test_chance_is_by_seed():
    assert [task(seed) for seed in range(20)] == TASKS[:20]
    assert len({task.scene for task in TASKS}) == len(TASKS)
    assert len({task.prompt for task in TASKS}) > 130
    assert not set(TRAINING_SEEDS) & set(HELD_OUT_SEEDS)
    source = TASKS[0].scene
    named = [COLOURS.values(), COLOURS.values(), TONES.values()]
    for colour, names in zip((source.circle_colour, source.square_colour, source.background), named):
        assert min(np.abs(np.subtract(colour, name)).max() for name in names) <= JITTER


def test_clean_pictures_are_read_exactly():
    """Colours to 1e-6, sizes to 0.0005 px, strengths to 0.0005."""
    for number in range(80):
        source, asked, strengths, true = edited(number)
        found = measured(drawn(true), source)
        assert colour_error(true, found) < 1e-6
        assert size_error(true, found) < 0.0005
        assert found.residual < 2e-4
        assert [edit_reached(edit, source, found) for edit in asked] == pytest.approx(list(strengths), abs=0.0005)
        assert drift(asked, source, found) < 0.01
        assert max(beside_path(edit, source, found) for edit in asked) < 1e-3


@pytest.mark.parametrize(
    ("spoil", "colour", "size", "strength", "residual"),
    [
        pytest.param(noisy, 0.05, 0.2, 0.1, 0.032, id="noise"),
        pytest.param(blurred, 0.05, 0.2, 0.1, 0.05, id="blur"),
        pytest.param(lambda picture: noisy(blurred(picture)), 0.06, 0.25, 0.12, 0.06, id="both"),
    ],
)
def test_spoilt_pictures_are_read_well(spoil, colour, size, strength, residual):
    """Noise of 0.03, and half the resolution."""
    for number in range(80, 130):
        source, asked, strengths, true = edited(number)
        found = measured(spoil(drawn(true)), source)
        assert colour_error(true, found) < colour
        assert size_error(true, found) < size
        assert [edit_reached(edit, source, found) for edit in asked] == pytest.approx(list(strengths), abs=strength)
        assert as_wanted(true, found)
        assert drift(asked, source, found) < 1
        assert 0.002 < found.residual < residual


@pytest.mark.parametrize("edit", EACH, ids=lambda edit: edit.attribute)
def test_reached_strength_rises_with_the_true_one(edit):
    strengths = np.linspace(*STRENGTHS, 9)
    for spoil in (np.copy, blurred):
        reached = [
            edit_reached(edit, SCENE, measured(spoil(drawn(edit.at(SCENE, strength))), SCENE)) for strength in strengths
        ]
        assert all(one < other for one, other in pairwise(reached))
        assert reached == pytest.approx(list(strengths), abs=0.08)


@pytest.mark.parametrize(
    ("asked", "done"),
    [
        (CIRCLE_RED, SQUARE_RED),
        (SQUARE_RED, CIRCLE_RED),
        (CIRCLE_BIGGER, replace(CIRCLE_BIGGER, attribute="square_size")),
        (SQUARE_SMALLER, replace(SQUARE_SMALLER, attribute="circle_size")),
        (CIRCLE_RED, CIRCLE_BIGGER),
        (BRIGHT, CIRCLE_RED),
        (CIRCLE_RED, BRIGHT),
    ],
)
def test_edits_of_something_else_are_told_apart(asked, done):
    for strength in (0.5, 1):
        found = measured(noisy(drawn(done.at(SCENE, strength))), SCENE)
        assert edit_reached(asked, SCENE, found) == pytest.approx(0, abs=0.05)
        assert drift([asked], SCENE, found) > 1.9
        assert drift([done], SCENE, found) < 1
        assert not as_wanted(asked.at(SCENE, strength), found)
        assert as_wanted(done.at(SCENE, strength), found)


def test_a_wrong_colour_is_beside_the_path():
    found = measured(drawn(replace(SCENE, circle_colour=COLOURS["green"])), SCENE)
    assert edit_reached(CIRCLE_RED, SCENE, found) == pytest.approx(0.5, abs=1e-3)
    assert beside_path(CIRCLE_RED, SCENE, found) > 5
    assert drift([CIRCLE_RED], SCENE, found) < 0.01
    half = measured(drawn(CIRCLE_RED.at(SCENE, 0.5)), SCENE)
    assert beside_path(CIRCLE_RED, SCENE, half) < 1e-3


def test_an_object_that_is_gone():
    found = measured(drawn(replace(SCENE, circle_colour=SCENE.background)), SCENE)
    assert found.circle_size == 0
    assert found.square_size == pytest.approx(6.5, abs=0.002)
    assert drift([SQUARE_RED], SCENE, found) > 5
    assert drift([CIRCLE_RED], SCENE, found) == pytest.approx(7 / SIZE_TOLERANCE)


def test_residual_tells_what_no_scene_explains():
    moved = replace(SCENE, circle_centre=(44.0, 15.0))
    assert measured(drawn(moved), SCENE).residual > 0.045
    assert measured(drawn(SCENE), SCENE).residual < 2e-4


def test_deviations_are_in_tolerances():
    off = replace(SCENE, circle_colour=(0.27 + COLOUR_TOLERANCE, 0.27, 0.73), square_size=6.5 - 2 * SIZE_TOLERANCE)
    expected = {"circle_colour": 1, "square_colour": 0, "background": 0, "circle_size": 0, "square_size": 2}
    assert deviations(SCENE, off) == pytest.approx(expected)
    assert not as_wanted(SCENE, off)
    assert as_wanted(SCENE, replace(off, circle_colour=(0.32, 0.27, 0.73), square_size=6.1))


@pytest.mark.parametrize("picture", [np.zeros((32, 32, 3)), np.full((SIDE, SIDE, 3), np.nan)])
def test_no_picture_to_measure(picture):
    with pytest.raises(ValueError, match="Expected finite numbers"):
        measured(picture, SCENE)
