"""The HTTP routes of the pack, on a real ComfyUI server."""

from __future__ import annotations

import io
import json
import urllib.error

import pytest
from PIL import Image, ImageSequence
from support.graphs import Graph

FRAME = {"filename": "photo.png", "subfolder": "", "type": "input"}


def error_of(server, path: str, body: object) -> str:
    """The message of the route's answer, status 400."""
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.post(path, body)
    assert refusal.value.code == 400
    return json.load(refusal.value)["error"]


def tokens(server, text: str, mode: str = "one per line") -> list[dict]:
    return json.loads(server.post("/edit_sliders/tokens", {"text": text, "mode": mode}))["phrases"]


def test_tokens_of_each_phrase(server):
    first, second = tokens(server, "make the cat older\n(golden:1.2) hair 😀")
    assert first["tokens"]["t5xxl"] == ["▁make", "▁the", "▁cat", "▁older"]
    assert first["tokens"]["clip_l"] == ["make</w>", "the</w>", "cat</w>", "older</w>"]
    assert second["tokens"]["t5xxl"][:3] == ["▁golden", "▁hair", "▁"]
    assert second["tokens"]["clip_l"][:2] == ["golden</w>", "hair</w>"]
    [marked] = tokens(server, "the [[cater]]pillar", "[[marked]] phrases")
    assert "".join(marked["tokens"]["t5xxl"]) == "▁cater"


def test_tokens_come_from_the_clip_that_ran_last(server):
    g = Graph()
    encoded = g.add("EditSlidersSliderPrompt", clip=g.clip(), text="a cat", mode="one per line", pad_to_512=True)
    g[encoded[0]]["inputs"] |= {"lowest": -0.5, "highest": 2.0}
    g.save(g.sample(g.stlora(g.model()), g.edited(encoded), steps=1))
    assert server.run(g).ok
    [phrase] = tokens(server, "a cat")
    assert phrase["tokens"]["t5xxl"] == ["▁", "a", "▁cat"]


def test_token_errors(server):
    assert "The prompt is empty" in error_of(server, "/edit_sliders/tokens", {"text": "\n", "mode": "one per line"})
    assert "not closed" in error_of(server, "/edit_sliders/tokens", {"text": "[[a", "mode": "[[marked]] phrases"})
    assert "expected a text and a mode" in error_of(server, "/edit_sliders/tokens", {"text": 3}).lower()
    assert "expected a JSON object" in error_of(server, "/edit_sliders/tokens", [1])
    [valid, empty] = tokens(server, "a cat\n()")
    assert valid["error"] == ""
    assert "'()' contains no text" in empty["error"]


def sweep_file(server, file_format: str, count: int = 5, **changes) -> bytes:
    body = {"format": file_format, "frames": [FRAME] * count, "captions": [f"{k}" for k in range(count)], "columns": 3}
    return server.post("/edit_sliders/sweep_file", {**body, **changes})


def test_sweep_files(server):
    animation = Image.open(io.BytesIO(sweep_file(server, "webp", metadata={"workflow": '{"nodes": []}'})))
    assert animation.format == "WEBP"
    assert animation.size == (64, 64)
    assert animation.getexif()[0x010F] == 'workflow:{"nodes": []}'

    strip = Image.open(io.BytesIO(sweep_file(server, "strip", metadata={"workflow": "{}"})))
    assert strip.width == 5 * 64 + 4 * 6
    assert strip.text == {"workflow": "{}"}
    grid = Image.open(io.BytesIO(sweep_file(server, "grid", heading="older")))
    assert grid.width == 3 * 64 + 2 * 6
    photo = Image.open(io.BytesIO(server.view(FRAME))).convert("RGB")
    second_row = grid.height - 36 - 64
    assert grid.crop((70, second_row, 134, second_row + 64)).tobytes() == photo.tobytes()


def test_sweep_files_keep_unicode_in_the_workflow(server):
    workflow = json.dumps({"text": "让她变老 é 😀"}, ensure_ascii=False)
    png = Image.open(io.BytesIO(sweep_file(server, "strip", heading="让她", metadata={"workflow": workflow})))
    webp = Image.open(io.BytesIO(sweep_file(server, "webp", metadata={"workflow": workflow})))
    assert json.loads(png.text["workflow"]) == json.loads(workflow)
    assert json.loads(webp.getexif()[0x010F].removeprefix("workflow:")) == json.loads(workflow)
    assert (
        png.size == Image.open(io.BytesIO(sweep_file(server, "strip"))).size
    )  # the font has no glyphs for the heading


def test_animations_play_forward_and_backward(server):
    names = [server.put_input(f"frame{k}.png", Image.new("RGB", (16, 16), (k * 80, 0, 0))) for k in range(4)]
    frames = [{**FRAME, "filename": name} for name in names]
    file = sweep_file(server, "webp", frames=frames, captions=[""] * 4, columns=4)
    reds = [frame.convert("RGB").getpixel((8, 8))[0] for frame in ImageSequence.Iterator(Image.open(io.BytesIO(file)))]
    assert [round(red / 80) for red in reds] == [0, 1, 2, 3, 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "gif"}, "expected 'webp', 'strip' or 'grid'"),
        ({"columns": 0}, "expected 1 to 5"),
        ({"columns": "3"}, "expected 1 to 5"),
        ({"captions": ["a"]}, "a caption for each"),
        ({"frames": []}, "a caption for each"),
        ({"frames": [{**FRAME, "subfolder": "../../models"}] * 5}, "is not in ComfyUI's"),
        ({"frames": [{**FRAME, "filename": "/etc/hostname"}] * 5}, "is not in ComfyUI's"),
        ({"frames": [{**FRAME, "type": "models"}] * 5}, "is not in ComfyUI's"),
        ({"frames": [{**FRAME, "filename": "gone.png"}] * 5}, "Render the sweep again"),
        ({"frames": [{**FRAME, "filename": "a\0b"}] * 5}, "null"),
        ({"metadata": {"workflow": 3}}, "map strings to strings"),
    ],
)
def test_invalid_sweep_files(server, changes, message):
    body = {"format": "strip", "frames": [FRAME] * 5, "captions": list("abcde"), "columns": 3, **changes}
    assert message in error_of(server, "/edit_sliders/sweep_file", body)
