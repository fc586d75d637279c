"""Reading training examples from folders and files."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import pytest
import torch
from PIL import Image
from support.training_run import INSTRUCTIONS, write_config, write_edit_strips, write_images

from training.config import read_config
from training.errors import TrainingError
from training.examples import ImageFile, read_examples, resize_to_area
from training.rng import example_index
from training.validation import ValidationRender, strength_curve, validation_sheet


@pytest.fixture
def place(tmp_path):
    write_images(tmp_path / "images", 4)
    return tmp_path


def examples_of(place, **data):
    return read_examples(read_config(write_config(place, {"data": data})))


def combined(place, **more):
    data = {
        "type": "combinations",
        "images": "images",
        "instructions": INSTRUCTIONS,
        "num_examples": 60,
        "num_validation": 6,
    }
    return examples_of(place, **{**data, **more})


def test_combinations(place):
    assert len(combined(place).validation) == 6
    everything = combined(place, num_validation=0).training
    assert len(everything) == 60
    assert {len(example.instructions) for example in everything} == {1, 2, 3}
    assert all(len(set(example.instructions)) == len(example.instructions) for example in everything)
    assert {example.instructions for example in everything} >= {(INSTRUCTIONS[0], INSTRUCTIONS[1]), (INSTRUCTIONS[1],)}
    uses = [sum(example.source.file.name == f"{k}.png" for example in everything) for k in range(4)]
    assert uses == [15] * 4
    assert combined(place, num_validation=0).training == everything
    assert combined(place) == combined(place)
    assert {len(example.instructions) for example in combined(place, max_instructions_per_prompt=1).training} == {1}


def test_mutually_exclusive_instructions_are_never_combined(place):
    apart = [INSTRUCTIONS[0], INSTRUCTIONS[2]]
    assert any(set(apart) <= set(example.instructions) for example in combined(place).training)
    found = combined(place, mutually_exclusive=[apart])
    assert not any(set(apart) <= set(example.instructions) for example in found.training)
    with pytest.raises(TrainingError, match=r"'make it day', which is not one of data\.instructions"):
        combined(place, mutually_exclusive=[["make it day", INSTRUCTIONS[0]]])


def test_instructions_from_a_file(place):
    (place / "instructions.txt").write_text("make it red\n\n  make it night \n", encoding="utf-8")
    found = combined(place, instructions="instructions.txt")
    assert {one for example in found.training for one in example.instructions} == {"make it red", "make it night"}


def test_pairs(place):
    lines = [
        {"image": "images/0.png", "instructions": ["a", "b", "c", "d"]},
        {"image": "images/1.png", "instructions": "e"},
    ]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = examples_of(place, type="pairs", path="pairs.jsonl", num_validation=0).training
    assert [(e.source.file.name, e.instructions) for e in found] == [
        ("0.png", ("a", "b", "c")),
        ("0.png", ("d",)),
        ("1.png", ("e",)),
    ]
    (place / "images" / "2.txt").write_text("make it red\nmake it night\n")
    found = examples_of(place, type="pairs", path="images", num_validation=0).training
    assert [(e.source.file.name, e.instructions) for e in found] == [("2.png", ("make it red", "make it night"))]


@pytest.mark.parametrize("line", ["no json", '{"image": "a.png"}', '{"image": "a.png", "instructions": [3]}', "[]"])
def test_pairs_that_cannot_be_read(place, line):
    (place / "pairs.jsonl").write_text(f'{{"image": "a.png", "instructions": ["x"]}}\n{line}\n')
    with pytest.raises(TrainingError, match=r"pairs\.jsonl, line 2: expected"):
        examples_of(place, type="pairs", path="pairs.jsonl")


def test_edit_strips(place):
    write_edit_strips(place / "edit_strips", 3)
    data = {"type": "edit_strips", "path": "edit_strips", "num_validation": 1}
    config = read_config(write_config(place, {"method": "projector", "data": data}))
    [first, *_] = read_examples(config).training
    assert first.source.column == 0
    assert [target.image.column for target in first.targets] == [1, 2, 3, 4, 5, 6, 7]
    assert [round(target.strength * 6, 6) for target in first.targets] == [0, 1, 2, 3, 4, 5, 6]
    reds = [target.image.open().getpixel((5, 5))[0] for target in first.targets]
    assert {b - a for a, b in pairwise(reds)} == {28}


def test_no_training_examples(place, tmp_path):
    with pytest.raises(TrainingError, match="none are left for training"):
        combined(place, num_examples=6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="contains no images"):
        combined(place, images="empty")


def test_every_epoch_has_each_example_once():
    epochs = [[example_index(7, number, 5) for number in range(start, start + 5)] for start in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


@pytest.mark.parametrize("size", [(640, 480), (100, 900), (64, 64), (33, 47)])
def test_images_keep_their_aspect_ratio(size):
    width, height = resize_to_area(Image.new("RGB", size), 256).size
    assert width % 16 == height % 16 == 0
    assert width * height == pytest.approx(256**2, rel=0.15)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.15)


def test_a_grid_of_two_sliders_shows_the_source():
    colors = torch.tensor([[0.0, 0.0, 1.0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 1]])  # the first is the source
    images = colors[:, None, None, :].expand(5, 64, 64, 3)
    drawn = validation_sheet(ValidationRender("a and b", images, [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]))
    cells = [(32, 70), (32, 172), (102, 172), (32, 274), (102, 274)]
    shown = [drawn.getpixel(cell) for cell in cells]
    assert shown == [tuple(map(round, (255 * color).tolist())) for color in colors]
    assert drawn.getpixel((102, 70)) == (255, 255, 255)


def test_strength_curve():
    """Gray levels: the source at 0; up by .2, back by .1, up by .3."""
    levels = torch.tensor([0.0, 0.1, 0.3, 0.2, 0.5])
    rendered = ValidationRender("a", levels[:, None, None, None].expand(5, 8, 8, 3), [(0.0,), (0.5,), (1.0,), (1.5,)])
    found = strength_curve(rendered)
    assert found.distances == pytest.approx([0.1, 0.3, 0.2, 0.5])
    assert found.rising == pytest.approx(2 / 3)
    assert found.first_order == pytest.approx(0.3 / 0.6)
    assert strength_curve(rendered._replace(strengths=[(0.0, 0.0)] * 4)) is None


def test_exif_orientation_is_applied(tmp_path):
    """Images are saved rotated with an EXIF orientation, as by phones."""
    lying = Image.new("RGB", (32, 16), "red")
    note = Image.Exif()
    note[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=note)
    assert ImageFile(tmp_path / "lying.jpg").open().size == (16, 32)


def test_instructions_are_one_line_each(tmp_path):
    write_images(tmp_path / "images", 2)
    record = {"image": "images/0.png", "instructions": ["make it red\n and darker", "add a hat"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
    found = examples_of(tmp_path, type="pairs", path="pairs.jsonl", num_validation=0)
    assert found.training[0].instructions == ("make it red and darker", "add a hat")


def test_validation_examples_are_not_trained_on(place):
    found = combined(place)
    learned = {(example.source, frozenset(example.instructions)) for example in found.training}
    assert not learned & {(example.source, frozenset(example.instructions)) for example in found.validation}


def test_few_examples_are_of_random_images(tmp_path):
    """Not of the first images by name."""
    write_images(tmp_path / "images", 40)
    data = {
        "type": "combinations",
        "images": "images",
        "instructions": INSTRUCTIONS,
        "num_examples": 8,
        "num_validation": 0,
    }
    used = sorted(example.source.file.name for example in examples_of(tmp_path, **data).training)
    by_name = sorted(file.name for file in (tmp_path / "images").iterdir())
    assert len(set(used)) == 8
    assert used != by_name[:8]


def test_a_warning_when_every_prompt_has_one_instruction(place, caplog):
    with caplog.at_level(logging.WARNING):
        combined(place)
        assert not caplog.text
        combined(place, max_instructions_per_prompt=1, num_validation=0)
    assert "has only one instruction" in caplog.text
