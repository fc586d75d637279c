"""Synthetic scenes: attributes are measured back from images, right edits told from wrong ones, seeds reproducible."""

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
    MAX_EDITS,
    MIN_COLOR_CHANGE,
    MIN_CONTRAST,
    SIZE_FACTORS,
    STRENGTHS,
    TRAINING_SEEDS,
    VALIDATION_SEEDS,
    Edit,
    apply_edits,
    edit_fits,
    is_legible,
    random_edits,
    random_task,
)
from training.miniature.read_attributes import (
    COLOR_TOLERANCE,
    SIZE_TOLERANCE,
    deviations,
    drift,
    path_deviation,
    reached_strength,
    read_attributes,
    within_tolerance,
)
from training.miniature.synthetic_scenes import (
    COLOR_OF,
    COLORS,
    JITTER,
    MAX_GROWTH,
    MIN_GAP,
    MIN_SIZE,
    SIDE,
    SIZE_OF,
    TONES,
    Scene,
    attribute_values,
    coverage,
    draw_scene,
    random_scene,
    scene_image,
    smallest_gap,
)
from training.rng import generator

TASKS = [random_task(seed) for seed in range(200)]
SCENE = Scene(
    circle_color=COLORS["blue"],
    square_color=COLORS["green"],
    background=TONES["dark"],
    circle_size=7.0,
    square_size=6.5,
    circle_center=(20.3, 18.6),
    square_center=(45.1, 44.8),
)
CIRCLE_RED = Edit("make the circle red", "circle_color", COLORS["red"])
SQUARE_RED = Edit("make the square red", "square_color", COLORS["red"])
CIRCLE_BIGGER = Edit("make the circle bigger", "circle_size", SIZE_FACTORS["bigger"])
SQUARE_SMALLER = Edit("make the square smaller", "square_size", SIZE_FACTORS["smaller"])
BRIGHT = Edit("make the background bright", "background", TONES["bright"])
EACH = [CIRCLE_RED, SQUARE_RED, CIRCLE_BIGGER, SQUARE_SMALLER, BRIGHT]


def blurred(picture):
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    half = torch.nn.functional.avg_pool2d(pixels, 2)
    return torch.nn.functional.interpolate(half, scale_factor=2, mode="bilinear")[0].permute(1, 2, 0).numpy()


def noisy(picture, seed=0):
    return picture + np.random.default_rng(seed).normal(0, 0.03, picture.shape).astype(np.float32)


def edited(number):
    """A task, strengths for it from -0.5 to 1.5, often at the ends, and the exact result."""
    source, asked = TASKS[number]
    rng = np.random.default_rng(number)
    strengths = rng.choice([*STRENGTHS, *rng.uniform(*STRENGTHS, 2)], len(asked))
    return source, asked, strengths, apply_edits(source, asked, strengths)


def color_error(true, found):
    return max(
        np.linalg.norm(attribute_values(true, one) - attribute_values(found, one))
        for one in (*COLOR_OF.values(), "background")
    )


def size_error(true, found):
    return max(abs(attribute_values(true, one) - attribute_values(found, one)).item() for one in SIZE_OF.values())


def test_objects_do_not_touch_each_other_or_the_border():
    for source, _ in TASKS:
        assert smallest_gap(source, MAX_GROWTH) >= MIN_GAP
        grown = replace(
            source, circle_size=source.circle_size * MAX_GROWTH, square_size=source.square_size * MAX_GROWTH
        )
        circle = coverage(grown, "circle") > 0
        square = coverage(grown, "square") > 0
        assert not (circle & square).any()
        for covered in (circle, square):
            assert not np.concatenate([covered[0], covered[-1], covered[:, 0], covered[:, -1]]).any()


def test_gap():
    assert smallest_gap(SCENE) == pytest.approx(18.6 - 7)
    assert smallest_gap(SCENE, 1.5) == pytest.approx(18.6 - 10.5)
    assert smallest_gap(replace(SCENE, circle_center=(6.0, 18.6))) == pytest.approx(-1)
    assert smallest_gap(replace(SCENE, circle_center=(45.1, 30.8))) == pytest.approx(0.5)
    assert smallest_gap(replace(SCENE, circle_center=(32.6, 30.3))) == pytest.approx(np.hypot(6, 8) - 7)


def test_image():
    picture = draw_scene(SCENE)
    assert (picture.shape, picture.dtype) == ((SIDE, SIDE, 3), np.float32)
    assert picture[18, 20] == pytest.approx(COLORS["blue"])
    assert picture[44, 45] == pytest.approx(COLORS["green"])
    assert picture[44, 20] == pytest.approx(TONES["dark"])
    shown = np.asarray(scene_image(SCENE), np.float32) / 255
    assert np.abs(shown - picture).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("size", [2.0, 3.7, 7.0, 14.0])
def test_coverage(size):
    """Within 1% of the true area; a square's is exact."""
    scene = replace(SCENE, circle_size=size, square_size=size)
    assert coverage(scene, "square").sum() == pytest.approx(4 * size**2, rel=1e-9)
    assert coverage(scene, "circle").sum() == pytest.approx(np.pi * size**2, rel=0.04 if size < 3 else 0.01)


def test_colors_differ():
    """Between objects, and between objects and backgrounds, by more than the smallest change of an edit."""
    for one, other in combinations(COLORS.values(), 2):
        assert np.subtract(one, other) @ np.subtract(one, other) >= 0.45**2
    for source, _ in TASKS:
        assert np.linalg.norm(np.subtract(source.circle_color, source.square_color)) >= 0.38
        for color in (source.circle_color, source.square_color):
            assert np.linalg.norm(np.subtract(color, source.background)) >= MIN_COLOR_CHANGE


def test_paths():
    assert all(edit.at(SCENE, 0) == SCENE for edit in EACH)
    assert CIRCLE_RED.at(SCENE, 1) == replace(SCENE, circle_color=COLORS["red"])
    assert CIRCLE_RED.at(SCENE, 0.5).circle_color == pytest.approx((0.5, 0.27, 0.5))
    assert CIRCLE_BIGGER.at(SCENE, 1.5).circle_size == pytest.approx(7 * 1.75)
    assert CIRCLE_BIGGER.at(SCENE, -0.5).circle_size == pytest.approx(7 * 0.75)
    assert SQUARE_SMALLER.at(SCENE, 1).square_size == pytest.approx(6.5 * 2 / 3)
    assert CIRCLE_BIGGER.at(SCENE, 9).circle_size == 7 * MAX_GROWTH
    assert SQUARE_SMALLER.at(SCENE, 9).square_size == MIN_SIZE
    assert CIRCLE_RED.at(SCENE, 9).circle_color == (1, 0.27, 0)
    assert CIRCLE_RED.at(SCENE, -9).circle_color == (0, 0.27, 1)


def test_edits_are_linear_within_strengths():
    for source, asked in TASKS:
        for edit in asked:
            values = [
                attribute_values(edit.at(source, strength), edit.attribute) for strength in np.linspace(*STRENGTHS, 5)
            ]
            steps = np.diff(values, axis=0)
            assert np.abs(steps - steps[0]).max() < 1e-9


def test_edits_together():
    strengths = [0.3, 1.2, -0.5, 0.8, 1.0]
    results = {
        apply_edits(SCENE, [EACH[k] for k in order], [strengths[k] for k in order]) for order in permutations(range(5))
    }
    assert len(results) == 1
    [result] = results
    for edit, strength in zip(EACH, strengths):
        assert attribute_values(result, edit.attribute) == pytest.approx(
            attribute_values(edit.at(SCENE, strength), edit.attribute)
        )
    contrary = [CIRCLE_BIGGER, replace(CIRCLE_BIGGER, full=SIZE_FACTORS["smaller"])]
    with pytest.raises(TrainingError, match="the same attribute twice"):
        apply_edits(SCENE, contrary, [1, 1])
    with pytest.raises(TrainingError, match="Expected 2 strengths, one per edit; found 1"):
        apply_edits(SCENE, [CIRCLE_RED, SQUARE_RED], [1])


def test_random_edits_are_visible_and_compatible():
    for source, asked in TASKS:
        assert len({edit.attribute for edit in asked}) == len(asked)
        for edit in asked:
            change = np.linalg.norm(
                attribute_values(edit.at(source, 1), edit.attribute) - attribute_values(source, edit.attribute)
            )
            if edit.attribute in SIZE_OF.values():
                assert change >= 0.3 * attribute_values(source, edit.attribute).item()
            else:
                assert change >= MIN_COLOR_CHANGE
        for strengths in np.random.default_rng(0).uniform(*STRENGTHS, (20, len(asked))):
            result = apply_edits(source, asked, strengths)
            for color in (result.circle_color, result.square_color):
                assert np.linalg.norm(np.subtract(color, result.background)) >= MIN_CONTRAST - 0.01


def test_invisible_edits_are_not_chosen():
    cyan_on_gray = replace(SCENE, circle_color=COLORS["cyan"], background=TONES["gray"])
    assert not is_legible(cyan_on_gray, [CIRCLE_RED])
    assert is_legible(cyan_on_gray, [SQUARE_RED])
    asked = [random_edits(generator(seed), cyan_on_gray, 3) for seed in range(100)]
    words = {edit.instruction for some in asked for edit in some}
    assert not any("circle" in one and one.endswith(("red", "cyan")) for one in words)
    assert any("circle" in one and one.endswith("blue") for one in words)
    assert not any("square" in one and one.endswith("green") for one in words)
    assert not any("background" in one and one.endswith("gray") for one in words)


def test_edits_of_another_scene():
    cyan_on_gray = replace(SCENE, circle_color=COLORS["cyan"], background=TONES["gray"])
    assert [edit_fits(cyan_on_gray, edit) for edit in EACH] == [False, True, True, True, True]
    assert [edit_fits(CIRCLE_RED.at(SCENE, 1), edit) for edit in EACH] == [False, True, True, True, True]
    assert all(edit_fits(SCENE, edit) for edit in EACH)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_number_of_edits(count):
    for seed in range(100):
        rng = generator(seed)
        assert len(random_edits(rng, random_scene(rng), count)) == count


def test_three_edits_fit_any_colors():
    for (circle, square), tone in product(permutations(COLORS.values(), 2), TONES.values()):
        source = replace(SCENE, circle_color=circle, square_color=square, background=tone)
        assert len(random_edits(generator(0), source, 3)) == 3


@pytest.mark.parametrize("count", [0, MAX_EDITS + 1])
def test_too_few_or_many_edits(count):
    with pytest.raises(TrainingError, match=f"The number of edits is {count}"):
        random_edits(generator(0), SCENE, count)


def test_variety():
    assert {len(asked) for _, asked in TASKS} == {1, 2, 3}
    every = [edit for seed in range(200, 700) for edit in random_task(seed).edits] + [
        e for _, asked in TASKS for e in asked
    ]
    kinds = Counter((edit.attribute, edit.full) for edit in every)
    assert len(kinds) == 2 * (len(COLORS) + len(SIZE_FACTORS)) + len(TONES)
    shares = Counter(edit.attribute for edit in every)
    assert max(shares.values()) < 1.4 * min(shares.values())
    for kind in kinds:
        assert len({edit.instruction for edit in every if (edit.attribute, edit.full) == kind}) >= 4


def test_instructions():
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


def test_seeds_are_reproducible():
    assert [random_task(seed) for seed in range(20)] == TASKS[:20]
    assert len({task.scene for task in TASKS}) == len(TASKS)
    assert len({task.prompt for task in TASKS}) > 130
    assert not set(TRAINING_SEEDS) & set(VALIDATION_SEEDS)
    source = TASKS[0].scene
    named = [COLORS.values(), COLORS.values(), TONES.values()]
    for color, names in zip((source.circle_color, source.square_color, source.background), named):
        assert min(np.abs(np.subtract(color, name)).max() for name in names) <= JITTER


def test_attributes_of_clean_images():
    """Colors to 1e-6, sizes to 0.0005 px, strengths to 0.0005."""
    for number in range(80):
        source, asked, strengths, true = edited(number)
        found = read_attributes(draw_scene(true), source)
        assert color_error(true, found) < 1e-6
        assert size_error(true, found) < 0.0005
        assert found.residual < 2e-4
        assert [reached_strength(edit, source, found) for edit in asked] == pytest.approx(list(strengths), abs=0.0005)
        assert drift(asked, source, found) < 0.01
        assert max(path_deviation(edit, source, found) for edit in asked) < 1e-3


@pytest.mark.parametrize(
    ("spoil", "color", "size", "strength", "residual"),
    [
        pytest.param(noisy, 0.05, 0.2, 0.1, 0.032, id="noise"),
        pytest.param(blurred, 0.05, 0.2, 0.1, 0.05, id="blur"),
        pytest.param(lambda picture: noisy(blurred(picture)), 0.06, 0.25, 0.12, 0.06, id="both"),
    ],
)
def test_attributes_of_degraded_images(spoil, color, size, strength, residual):
    """Noise of 0.03, and half the resolution."""
    for number in range(80, 130):
        source, asked, strengths, true = edited(number)
        found = read_attributes(spoil(draw_scene(true)), source)
        assert color_error(true, found) < color
        assert size_error(true, found) < size
        assert [reached_strength(edit, source, found) for edit in asked] == pytest.approx(list(strengths), abs=strength)
        assert within_tolerance(true, found)
        assert drift(asked, source, found) < 1
        assert 0.002 < found.residual < residual


@pytest.mark.parametrize("edit", EACH, ids=lambda edit: edit.attribute)
def test_reached_strength_rises_with_the_true_one(edit):
    strengths = np.linspace(*STRENGTHS, 9)
    for spoil in (np.copy, blurred):
        reached = [
            reached_strength(edit, SCENE, read_attributes(spoil(draw_scene(edit.at(SCENE, strength))), SCENE))
            for strength in strengths
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
def test_edits_of_another_attribute_do_not_count(asked, done):
    for strength in (0.5, 1):
        found = read_attributes(noisy(draw_scene(done.at(SCENE, strength))), SCENE)
        assert reached_strength(asked, SCENE, found) == pytest.approx(0, abs=0.05)
        assert drift([asked], SCENE, found) > 1.9
        assert drift([done], SCENE, found) < 1
        assert not within_tolerance(asked.at(SCENE, strength), found)
        assert within_tolerance(done.at(SCENE, strength), found)


def test_a_wrong_color_deviates_from_the_path():
    found = read_attributes(draw_scene(replace(SCENE, circle_color=COLORS["green"])), SCENE)
    assert reached_strength(CIRCLE_RED, SCENE, found) == pytest.approx(0.5, abs=1e-3)
    assert path_deviation(CIRCLE_RED, SCENE, found) > 5
    assert drift([CIRCLE_RED], SCENE, found) < 0.01
    half = read_attributes(draw_scene(CIRCLE_RED.at(SCENE, 0.5)), SCENE)
    assert path_deviation(CIRCLE_RED, SCENE, half) < 1e-3


def test_a_missing_object():
    found = read_attributes(draw_scene(replace(SCENE, circle_color=SCENE.background)), SCENE)
    assert found.circle_size == 0
    assert found.square_size == pytest.approx(6.5, abs=0.002)
    assert drift([SQUARE_RED], SCENE, found) > 5
    assert drift([CIRCLE_RED], SCENE, found) == pytest.approx(7 / SIZE_TOLERANCE)


def test_residual_of_images_that_no_scene_explains():
    moved = replace(SCENE, circle_center=(44.0, 15.0))
    assert read_attributes(draw_scene(moved), SCENE).residual > 0.045
    assert read_attributes(draw_scene(SCENE), SCENE).residual < 2e-4


def test_deviations_are_in_tolerances():
    off = replace(SCENE, circle_color=(0.27 + COLOR_TOLERANCE, 0.27, 0.73), square_size=6.5 - 2 * SIZE_TOLERANCE)
    expected = {"circle_color": 1, "square_color": 0, "background": 0, "circle_size": 0, "square_size": 2}
    assert deviations(SCENE, off) == pytest.approx(expected)
    assert not within_tolerance(SCENE, off)
    assert within_tolerance(SCENE, replace(off, circle_color=(0.32, 0.27, 0.73), square_size=6.1))


@pytest.mark.parametrize("picture", [np.zeros((32, 32, 3)), np.full((SIDE, SIDE, 3), np.nan)])
def test_invalid_images(picture):
    with pytest.raises(ValueError, match="Expected finite numbers"):
        read_attributes(picture, SCENE)
