"""The grid of a sweep: its images and captions, and the workflow embedded in its files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.graphs import Graph, Link

from slider_core.errors import SliderError
from slider_core.figures.captions import sweep_captions
from slider_core.figures.contact_sheet import CAPTION_HEIGHT, GAP


def plain_images(g: Graph, count: int) -> Link:
    """A batch of `count` images 32 x 16, each of a single color."""
    image = None
    for k in range(count):
        plain_image = g.add("EmptyImage", width=32, height=16, batch_size=1, color=0x200000 * k + 0x20)
        image = plain_image if image is None else g.add("ImageBatch", image1=image, image2=plain_image)
    return image


def run_sweep_grid(server, count: int, grid: bool = False, **more):
    g = Graph()
    inputs = {"columns": 0, "captions": "", "heading": "", "filename_prefix": "sweeps/test", **more}
    if grid:
        lists = [g.add("EditSlidersStrengthList", values=values) for values in ("0, 1", "0, 0.5, 1")]
        down = g.add("EditSlidersStrengthGrid", down=lists[0], across=lists[1])
        inputs |= {"strengths": down, "across": [down[0], 1], "columns": [down[0], 2]}
    node = g.add("EditSlidersSweepSheet", images=plain_images(g, count), **inputs)
    save_image = g.add("SaveImage", images=node, filename_prefix="sweeps/kept")
    result = server.wait(server.submit(g, {"nodes": [], "name": "Größe"}))
    return g, result, node[0], save_image[0]


def test_grid_is_saved_with_its_workflow(server):
    graph, result, node, save_image = run_sweep_grid(server, 6, grid=True)
    assert result.ok, result.error
    grid_image, animation = result.images(node)
    assert grid_image.size == (3 * 32 + 2 * GAP, 2 * (16 + CAPTION_HEIGHT))
    for k in range(6):
        left, upper = k % 3 * (32 + GAP), k // 3 * (16 + CAPTION_HEIGHT)
        assert grid_image.getpixel((left + 16, upper + 8)) == (0x20 * k, 0, 0x20)
        caption = np.asarray(grid_image)[upper + 16 : upper + 16 + CAPTION_HEIGHT, left : left + 32]
        assert caption.min() < 100 < caption.max()
    assert np.array_equal(np.asarray(grid_image), np.asarray(result.images(save_image)[0]))
    assert json.loads(grid_image.text["prompt"]) == graph
    assert json.loads(grid_image.text["workflow"])["name"] == "Größe"
    assert animation.n_frames == 2 * 6 - 2
    exif = animation.getexif()
    assert json.loads(exif[0x0110].removeprefix("prompt:")) == graph
    assert json.loads(exif[0x010F].removeprefix("workflow:"))["name"] == "Größe"


def test_strip_single_image_and_error(server):
    _, strip, node, _ = run_sweep_grid(server, 3, captions="a\nb\nc", heading="letters")
    assert strip.ok, strip.error
    assert strip.images(node)[0].size == (3 * 32 + 2 * GAP, 16 + 2 * CAPTION_HEIGHT)
    _, single, node, _ = run_sweep_grid(server, 1)
    assert single.ok, single.error
    assert len(single.images(node)) == 1
    _, invalid, *_ = run_sweep_grid(server, 5, grid=True)
    assert "6 strengths, but 5 image(s)" in invalid.error["exception_message"]


def test_captions():
    assert sweep_captions(2, [(0.0, 1.25)]) == ["0", "1.25"]
    assert sweep_captions(2, [(0.0, 1.0), (-0.5, 1 / 3)]) == ["0 / -0.5", "1 / 0.333333"]
    assert sweep_captions(2, [(0.0, 1.0)], "one\n two \n") == ["one", "two"]
    assert sweep_captions(2, []) == ["", ""]
    with pytest.raises(SliderError, match=r"3 captions, but 2 image"):
        sweep_captions(2, [], "1\n2\n3")
    with pytest.raises(SliderError, match=r"1 strengths, but 2 image"):
        sweep_captions(2, [(0.0, 1.0), (0.5,)])
