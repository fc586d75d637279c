"""python -m training prepare, on a real ComfyUI with tiny models."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import aiohttp
import numpy as np
import pytest
import yaml
from conftest import REPO
from PIL import Image
from support.graphs import Graph

from slider_core.errors import SliderError
from training.data_preparation.config import read_prepare_config
from training.data_preparation.distances import get_distance, pixel_distance
from training.data_preparation.edits import read_edits
from training.data_preparation.graphs import build_graphs, fill_placeholders
from training.data_preparation.prepare import prepare
from training.data_preparation.rendering_server import RenderingServer
from training.data_preparation.strip_files import StripFiles, measure_strip
from training.data_preparation.work_queue import WorkQueue
from training.edit_strips import NUM_COLUMNS, read_edit_strips, read_record
from training.errors import TrainingError

OPENER = build_opener(ProxyHandler({}))
DEAD = "http://127.0.0.1:9"
SIDE = 64
BUILT_IN = {"model": "m.safetensors", "text_encoders": ["l.safetensors", "t.safetensors"], "vae": "taef1"}


def edit_graph() -> Graph:
    """A full edit by the tiny model, from the photograph itself so that it stays recognizable."""
    graph = Graph()
    picture(graph, graph.model(), graph.add("CLIPTextEncode", clip=graph.clip(), text="{instruction}"), 1.0)
    return graph


def strengths_graph() -> Graph:
    """An edit with an adapter, from interpolated latents, so the changes are even."""
    graph = Graph()
    text = graph.instructions("{instruction}")
    edit = graph.add("VAEEncode", pixels=graph.add("LoadImage", image="{edit}"), vae=vae(graph))
    between = graph.add("LatentBlend", samples1=edit, samples2=source(graph), blend_factor="{strength}")
    picture(graph, graph.gstlora(graph.model(), "{strength}"), text, 0.05, between)
    return graph


def picture(graph: Graph, model: list, text: list, denoise: float, start: list | None = None) -> None:
    positive = graph.add("ReferenceLatent", conditioning=text, latent=source(graph))
    samples = graph.sample(model, positive, latent=start or source(graph), seed="{seed}", steps=1, denoise=denoise)
    graph.add("PreviewImage", images=graph.add("VAEDecode", samples=samples, vae=vae(graph)))


def source(graph: Graph) -> list:
    return graph.add("VAEEncode", pixels=graph.add("LoadImage", image="{image}"), vae=vae(graph))


def vae(graph: Graph) -> list:
    return graph.add("VAELoader", vae_name="taef1")


def in_a_thread(work, *args):
    """The browser of other tests keeps an event loop running in this one."""
    with ThreadPoolExecutor() as thread:
        return thread.submit(work, *args).result()


@pytest.fixture
def given(tmp_path, server) -> dict:
    """A config for one photograph and one instruction, with all files that it names."""
    (tmp_path / "images").mkdir()
    Image.open(REPO / "demo" / "photo.jpg").resize((96, 96)).save(tmp_path / "images" / "a b.png")
    (tmp_path / "edit.json").write_text(json.dumps(edit_graph()))
    (tmp_path / "strengths.json").write_text(json.dumps(strengths_graph()))
    return {
        "output": "out",
        "servers": [server.url],
        "data": {"type": "folder", "images": "images", "instructions": {"stylization": ["make it red"]}},
        "render": {"type": "graphs", "edit": "edit.json", "strengths": "strengths.json"},
        "resolution": SIDE,
        "strip_resolution": 48,
        "distance": "pixels",
    }


@pytest.fixture
def run(tmp_path, given):
    """Run prepare on the config, with changes."""
    return lambda **changes: in_a_thread(prepare, read_prepare_config(written(tmp_path, {**given, **changes})))


def written(folder: Path, content: dict) -> Path:
    (folder / "prepare.yaml").write_text(yaml.safe_dump(content))
    return folder / "prepare.yaml"


def strips_of(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out" / "edit_strips").glob("*.json"))


def columns_of(file: Path) -> list[Image.Image]:
    whole = Image.open(file)
    width = whole.width // NUM_COLUMNS
    return [whole.crop((k * width, 0, (k + 1) * width, whole.height)) for k in range(NUM_COLUMNS)]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a web server in this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def prompts_so_far(server) -> int:
    return len(json.loads(server.get("/history")))


def test_edit_strips_are_rendered_once(tmp_path, server, given, run, capfd):
    """Two images, one of them damaged, and two servers, one unavailable: strips, records and report."""
    (tmp_path / "images" / "damaged.png").write_bytes(b"no picture")
    report = run(servers=[DEAD, server.url])
    assert f"{DEAD} is not used: {DEAD} does not respond" in "".join(capfd.readouterr())
    assert "1 of 1 edit strips" in report or "0 of 1 edit strips" in report
    assert "1 edits failed" in report
    assert "damaged.png, 'make it red': the image" in report
    [file] = strips_of(tmp_path)
    assert file.stem.startswith("a_b_")

    record = read_record(file)
    assert record["image_name"] == file.with_suffix(".png").name
    assert (record["edit_instruction"], record["category"]) == ("make it red", "stylization")
    assert record["distance"] == "pixels"
    columns = columns_of(file.with_suffix(".png"))
    assert {column.size for column in columns} == {(48, 48)}

    original = Image.open(tmp_path / "images" / "a b.png").resize((48, 48), Image.Resampling.LANCZOS)
    from_source = [pixel_distance(column, original) for column in columns]
    from_edit = [pixel_distance(column, columns[-1]) for column in columns]
    assert from_source[0] < 0.01
    assert from_source[2] < from_source[4] < from_source[6] < from_source[8]
    assert from_edit[1] > from_edit[3] > from_edit[5] > from_edit[7]
    assert record["lpips_sequence"] == pytest.approx([pixel_distance(a, b) for a, b in pairwise(columns)])
    assert record["lpips_kontext_edit"] == pytest.approx(from_edit[0])
    assert record["lpips_edit_inversion"] == pytest.approx(from_edit[7])
    assert record["lpips_inversion_edit"] == pytest.approx(pixel_distance(columns[7], columns[1]))
    assert len(record["lpips_sequence_triangle"]) == NUM_COLUMNS - 2

    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (told["num_strips"], len(told["failed"])) == (1, 1)
    assert sum(told["outcomes"].values()) == 1
    assert np.asarray(Image.open(tmp_path / "out" / "report.png")).std() > 10

    [strip] = read_edit_strips(tmp_path / "out" / "edit_strips", 10, False)
    assert (strip.instruction, strip.num_columns) == ("make it red", NUM_COLUMNS)
    assert list(strip.strengths) == list(range(1, 8))
    with pytest.raises(TrainingError, match="1 x changes unevenly"):
        read_edit_strips(tmp_path / "out" / "edit_strips", 0.0, False)

    (tmp_path / "images" / "damaged.png").unlink()
    before, prompts = file.stat().st_mtime_ns, prompts_so_far(server)
    run(servers=[DEAD])
    assert file.stat().st_mtime_ns == before

    run(servers=[DEAD], data={**given["data"], "instructions": ["make it red"], "category": "reimagining"})
    assert read_record(file)["category"] == "reimagining"
    assert read_record(file)["lpips_sequence"] == record["lpips_sequence"]
    assert prompts_so_far(server) == prompts

    run(seed=5)
    assert prompts_so_far(server) == prompts + 8
    assert read_record(file)["made_of"] != record["made_of"]
    assert strips_of(tmp_path) == [file]

    other = {**given["data"], "instructions": ["make it blue"]}
    with pytest.raises(TrainingError, match="1 of them belong to edits that are not in this config"):
        run(seed=5, data=other, servers=[DEAD])


def test_no_server(tmp_path, run):
    with pytest.raises(TrainingError, match="No server is left, and 1 edits are not rendered"):
        run(servers=[DEAD])
    assert strips_of(tmp_path) == []


def test_a_server_that_is_not_comfyui(run, tmp_path, capfd):
    with serving(SimpleHTTPRequestHandler) as url, pytest.raises(TrainingError, match="No server is left"):
        run(servers=[url])
    assert f"{url} is not used: HTTP 404" in "".join(capfd.readouterr())


def test_uploaded_images_are_not_overwritten(server):
    """Another prompt may be reading them. A damaged file of the same name is not overwritten either."""

    async def uploaded(*pictures: bytes) -> list[str]:
        async with aiohttp.ClientSession() as session:
            return [await RenderingServer(server.url, session).upload(one) for one in pictures]

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    png = buffer.getvalue()
    [first] = asyncio.run(uploaded(png))
    file = server.base / "temp" / first.removesuffix(" [temp]")
    os.utime(file, (1, 1))
    assert asyncio.run(uploaded(png)) == [first]
    assert file.stat().st_mtime == 1
    file.write_bytes(png[:20])
    [other] = asyncio.run(uploaded(png))
    assert other != first
    assert (server.base / "temp" / other.removesuffix(" [temp]")).read_bytes() == png


def test_a_server_that_dies(tmp_path, server, given, run, capfd):
    """In the middle of a strip: another server continues it."""

    class Dying(BaseHTTPRequestHandler):
        """Forwards requests to the real server, until it is asked for a fourth image; then it no longer responds."""

        prompts = 0

        def do_GET(self) -> None:
            self.hand_on(None)

        def do_POST(self) -> None:
            Dying.prompts += self.path == "/prompt"
            self.hand_on(self.rfile.read(int(self.headers["Content-Length"])))

        def hand_on(self, body: bytes | None) -> None:
            if Dying.prompts == 4:
                self.connection.close()
                return
            headers = {"Content-Type": self.headers["Content-Type"]} if body else {}
            with OPENER.open(Request(server.url + self.path, body, headers)) as answer:
                self.send_response(answer.status)
                self.end_headers()
                self.wfile.write(answer.read())

        def log_message(self, *_: object) -> None:
            pass

    before = prompts_so_far(server)
    with serving(Dying) as url:
        report = run(servers=[url, server.url], data={**given["data"], "instructions": ["make it red", "make it blue"]})
    assert "edits failed" not in report
    assert len(strips_of(tmp_path)) == 2
    assert prompts_so_far(server) == before + 16
    assert f"{url} does not respond" in "".join(capfd.readouterr())


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_stopped_and_killed(tmp_path, server, given, run):
    """A run that is killed, then one that is stopped by Ctrl-C, then one to the end."""
    data = {**given["data"], "instructions": [f"add hat {k}" for k in range(3)]}
    config = written(tmp_path, {**given, "data": data})
    kept: dict[Path, int] = {}
    for way in (signal.SIGKILL, signal.SIGINT):
        command = [sys.executable, "-m", "training", "prepare", str(config)]
        with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True) as process:
            while len(strips_of(tmp_path)) == len(kept) and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(way)
            _, told = process.communicate()
        assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
        kept = {file: file.stat().st_mtime_ns for file in strips_of(tmp_path)}
        assert len(read_edit_strips(tmp_path / "out" / "edit_strips", 10, False)) == len(kept), told
    assert process.returncode == 130, told
    assert told.endswith("Interrupted. Finished work is kept; start the same command again to resume.\n")
    run(data=data)
    assert len(strips_of(tmp_path)) == 3
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"unet_name": "absent.safetensors"},
            "UNETLoader (UNETLoader_8): Value not in list: unet_name: 'absent.safetensors' not in [",
        ),
        ({"text": " "}, "EditSlidersEncodeSubInstructions: The prompt is empty"),
    ],
)
def test_a_graph_that_fails(tmp_path, run, change, told):
    """Rejected by validation, or failed in a node: the server's message is reported and no file remains."""
    graph = strengths_graph()
    for node in graph.values():
        node["inputs"] |= {key: value for key, value in change.items() if key in node["inputs"]}
    (tmp_path / "strengths.json").write_text(json.dumps(graph))
    report = run()
    assert told in report
    assert "0 of 0 edit strips" in report
    assert strips_of(tmp_path) == []
    assert not (tmp_path / "out" / "report.png").exists()


def test_items_that_one_worker_fails_at_are_done_by_another():
    """Items that all workers fail at are abandoned."""

    async def works(queue, worker, can):
        did = []
        while (piece := await queue.take(worker)) is not None:
            await asyncio.sleep(0)
            if can(piece):
                did.append(piece)
                await queue.done(worker)
            else:
                await queue.failed(worker, f"{worker} cannot")
        await queue.worker_left(worker)
        return did

    async def both():
        queue = WorkQueue(range(6), ["good", "bad"])
        did = await asyncio.gather(works(queue, "good", lambda k: k != 3), works(queue, "bad", lambda k: False))
        return did, queue

    (good, bad), queue = in_a_thread(asyncio.run, both())
    assert sorted(good) == [0, 1, 2, 4, 5]
    assert bad == []
    assert set(queue.abandoned) == {3}
    assert "good cannot" in queue.abandoned[3]
    assert not queue.waiting


def test_the_item_of_a_worker_that_left_is_returned():
    async def lost():
        queue = WorkQueue("xy", ["one", "other"])
        assert await queue.take("one") == "x"
        assert await queue.take("other") == "y"
        await queue.done("other")
        waiting = asyncio.ensure_future(queue.take("other"))
        await asyncio.sleep(0)
        await queue.worker_left("one")
        assert await waiting == "x"
        await queue.worker_left("other")
        return list(queue.waiting)

    assert in_a_thread(asyncio.run, lost()) == ["x"]


def test_cancelled_renderings_are_removed_from_the_server(server):
    """Both the running and the waiting one; the server is free at once, not after ten thousand steps."""
    graph = edit_graph()
    for node in graph.values():
        node["inputs"].update({"steps": 10_000} if node["class_type"] == "KSampler" else {})
    values = {"image": "photo.png", "instruction": "make it red"}

    def in_queue() -> int:
        return sum(map(len, json.loads(server.get("/queue")).values()))

    async def cancelled():
        async with aiohttp.ClientSession() as session:
            rendering = RenderingServer(server.url, session)
            tasks = [
                asyncio.ensure_future(rendering.render(fill_placeholders(graph, {**values, "seed": k})))
                for k in range(2)
            ]
            while in_queue() < 2:
                await asyncio.sleep(0.02)
            for task in reversed(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert all(task.cancelled() for task in tasks)

    in_a_thread(asyncio.run, cancelled())
    deadline = time.monotonic() + 60
    while in_queue() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert in_queue() == 0


def test_an_image_never_has_the_record_of_another(tmp_path):
    """A strip that could not be replaced completely counts as missing."""
    files = StripFiles(tmp_path, "one")
    red, blue = ([Image.new("RGB", (4, 4), color)] * NUM_COLUMNS for color in ("red", "blue"))
    distances = measure_strip(red, lambda one, other: 0.1)
    files.write(red, {"edit_instruction": "make it red", **distances})
    assert files.read_record()["image_name"] == "one.png"
    assert [one.tobytes() for one in files.read_columns()] == [one.tobytes() for one in red]
    with pytest.raises(ValueError, match="JSON"):
        files.write(blue, {"edit_instruction": "make it blue", **distances, "lpips_kontext_edit": math.nan})
    assert files.read_record() == {}
    files.write(blue, {"edit_instruction": "make it blue", **distances})
    files.image.unlink()
    assert files.read_record() == {}


BUILT_INS = {
    "latents": {"type": "latents", "denoise": 0.02},
    "stlora": {"type": "sliders", "adapter": "selective_lora.pt", "adapter_type": "stlora"},
    "gstlora": {"type": "sliders", "adapter": "gst_peft.safetensors", "adapter_type": "gstlora"},
}


@pytest.mark.parametrize("name", BUILT_INS)
def test_built_in_graphs(name, server, tmp_path, given, run):
    """The server accepts them, and fails only at the text encoders, which are too small for the stock loader."""
    render = {
        "model": "tiny-kontext.safetensors",
        "text_encoders": ["tiny-clip-l.safetensors", "tiny-t5xxl.safetensors"],
        "vae": "taef1",
        "steps": 1,
        **BUILT_INS[name],
    }
    assert "DualCLIPLoader: Error(s) in loading state_dict" in run(render=render)

    config = read_prepare_config(written(tmp_path, {**given, "render": render}))
    clip_l, t5xxl = render["text_encoders"]
    tiny = {"class_type": "TinyTestTextEncoders", "inputs": {"clip_l": clip_l, "t5xxl": t5xxl}}
    for role, graph in zip(("edit", "strengths"), build_graphs(config.render)):
        (tmp_path / f"{role}.json").write_text(json.dumps({**graph, "clip": tiny}))
    run()
    [file] = strips_of(tmp_path)
    columns = columns_of(file.with_suffix(".png"))
    from_edit = [pixel_distance(column, columns[-1]) for column in columns]
    assert from_edit[1] > from_edit[7] > 0
    if name == "latents":
        assert from_edit[1] > from_edit[3] > from_edit[5] > from_edit[7]


def test_a_server_that_fails_at_everything(tmp_path, given, run):
    graph = edit_graph()
    graph["UNETLoader_0"]["inputs"]["unet_name"] = "absent.safetensors"
    (tmp_path / "edit.json").write_text(json.dumps(graph))
    instructions = [f"add hat {k}" for k in range(12)]
    with pytest.raises(TrainingError) as error:
        run(data={**given["data"], "instructions": instructions})
    assert "10 edits failed" in str(error.value)
    assert "No server is left, and 2 edits are not rendered" in str(error.value)


def test_placeholders():
    graph = {"a": {"inputs": {"n": "{strength}", "t": "Do: {instruction} {seed} {other}", "l": ["a", 0]}}}
    values = {"strength": 0.5, "instruction": "{seed}!", "seed": 3}
    assert fill_placeholders(graph, values)["a"]["inputs"] == {"n": 0.5, "t": "Do: {seed}! 3 {other}", "l": ["a", 0]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read"),
        ('{"nodes": [], "links": []}', "is not a graph in ComfyUI's API format"),
        ('{"1": {"class_type": "A", "inputs": {"x": "{image}"}}}', 'does not contain "{strength}"'),
    ],
)
def test_graph_files(tmp_path, given, content, told):
    (tmp_path / "strengths.json").write_text(content)
    with pytest.raises(TrainingError, match=told):
        build_graphs(read_prepare_config(written(tmp_path, given)).render)


def test_json_lines(tmp_path, given):
    lines = tmp_path / "edits.jsonl"
    lines.write_text('{"image": "images/a.png", "instruction": " make  it red "}\n\n{"image": "b.png"}\n[1]\n')
    config = {**given, "data": {"type": "jsonl", "path": "edits.jsonl"}}
    with pytest.raises(TrainingError, match=r"edits.jsonl, line 3, line 4: expected"):
        read_edits(read_prepare_config(written(tmp_path, config)).data)
    lines.write_text('{"image": "images/a.png", "instruction": " make  it red "}\n' * 2)
    [edit] = read_edits(read_prepare_config(written(tmp_path, config)).data)
    assert (edit.image, edit.instruction, edit.category) == (tmp_path / "images" / "a.png", "make it red", "")


def test_config_errors(tmp_path, given):
    wrong = {**given, "servers": ["localhost"], "resolution": 70, "serverz": 1}
    wrong["render"] = {"type": "latents", "denoise": 2, **BUILT_IN, "modle": "x"}
    del wrong["data"]["instructions"]
    with pytest.raises(TrainingError) as error:
        read_prepare_config(written(tmp_path, wrong))
    told = str(error.value)
    assert told.count("prepare.yaml, line ") == 6
    for part in (
        "servers.0: expected the address of a ComfyUI server, such as http://127.0.0.1:8188, found 'localhost'",
        "resolution: Input should be a multiple of 16, found 70",
        "serverz: unknown key; expected one of data, distance, filter, output, render, resolution, seed,",
        "render.modle: unknown key; expected one of denoise, guidance, model, neutral_prompt,",
        "render.denoise: Input should be less than or equal to 1, found 2",
        "data.instructions: Field required",
    ):
        assert part in told
    with pytest.raises(TrainingError, match="cannot be read"):
        read_prepare_config(tmp_path / "absent.yaml")


def test_the_example_can_be_read():
    config = read_prepare_config(REPO / "training" / "configs" / "prepare.yaml")
    assert config.render.type == "latents"
    assert set(build_graphs(config.render).edit) < set(build_graphs(config.render).strengths)


def test_strips_of_version_0_1_are_kept(tmp_path):
    """It wrote them into stacks/, which is used if it exists."""
    data = {"type": "folder", "images": "images", "instructions": ["make it red"]}
    render = {"type": "latents", **BUILT_IN}
    config = read_prepare_config(
        written(tmp_path, {"output": "out", "servers": [DEAD], "data": data, "render": render})
    )
    assert config.strips_folder == tmp_path / "out" / "edit_strips"
    (tmp_path / "out" / "stacks").mkdir(parents=True)
    assert config.strips_folder == tmp_path / "out" / "stacks"


def test_distances():
    black, white = (Image.new("RGB", (80, 48), color) for color in ("black", "white"))
    half = white.copy()
    half.paste("black", (0, 0, 40, 48))
    assert get_distance("pixels")(black, black) == 0
    assert pixel_distance(black, white) == 1
    assert pixel_distance(half, white) == pytest.approx(math.sqrt(0.5), rel=1e-3)


def test_missing_lpips_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SliderError, match="pip install lpips"):
        get_distance("lpips")
