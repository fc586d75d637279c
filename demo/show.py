"""Edits at many strengths, drawn by a real ComfyUI, and a page that shows them.

With the FLUX.1 Kontext, text encoders, VAE and SliderEdit adapter of COMFYUI_PATH if they are all there: a photograph,
one slider. Otherwise with a miniature edit model that was trained on pictures of a circle and a square: one slider, two
sliders, their grid, a slider before and after calibration, and an edit without any adapter.

    python run.py demo            draw
    python run.py demo --open     start ComfyUI with the same graph, for the browser
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from graph import CALIBRATED, PICTURE, Graph, Strengths, calibrated_graph, edit_graph, parallel_graph, projector_graph
from models import MINIATURE, MINIATURE_FOLDER, Models, has_accelerator, users_models, users_python
from page import Shown, write_page
from PIL import Image
from workflow import NAME, workflow

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

from support.comfy_server import ComfyServer  # noqa: E402

from slider_core.figures.contact_sheet import animated_webp, contact_sheet  # noqa: E402

PHOTO, SCENE = ROOT / "demo" / "photo.jpg", ROOT / "demo" / "scene.png"
OUTPUT = ROOT / "demo" / "output"
PHOTO_INSTRUCTION = "turn the cat into a golden statue with emerald eyes that shine in the evening sun"
COLOUR, SIZE, GROUND = "make the circle red", "make the square bigger", "make the background dark"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
FIVE = (0.0, 0.25, 0.5, 0.75, 1.0)
NINE = tuple(k / 8 for k in range(9))
MANY = tuple(k / 20 for k in range(21))
SIDE = 192
PACK = {"ComfyUI-EditSliders": ROOT}
MODEL_FOLDERS = ("diffusion_models", "unet", "text_encoders", "clip", "vae", "vae_approx", "loras")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open", action="store_true", help="keep ComfyUI running, with the graph in its workflows")
    chosen = parser.parse_args()
    comfyui = Path(os.environ["COMFYUI_PATH"])
    found, missing = users_models(comfyui / "models")
    if found is None:
        print(f"No complete FLUX.1 Kontext in {comfyui / 'models'}: no {', '.join(missing)}.")
        print("Drawing with the miniature model: 64x64 pictures of a circle and a square.")
    with tempfile.TemporaryDirectory(prefix="edit-sliders-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        with _server(comfyui, base, found) as server:
            for picture in (PHOTO, SCENE):
                shutil.copy(picture, base / "input")
            if chosen.open:
                _stay_open(server, found or MINIATURE)
            else:
                OUTPUT.mkdir(exist_ok=True)
                shown = of_photograph(server, found, OUTPUT) if found else of_miniature(server, OUTPUT)
                page = write_page(OUTPUT / "index.html", shown)
                print(*(one.file for one in shown), page, sep="\n")


def of_photograph(server: ComfyServer, models: Models, output: Path) -> list[Shown]:
    graphs = [edit_graph(models, PHOTO.name, [PHOTO_INSTRUCTION], [one]) for one in STRENGTHS]
    pictures = [_draw(server, graph)[0][0] for graph in graphs]
    return [Shown("One slider", PHOTO_INSTRUCTION, _strip(output / "one-slider.png", pictures, STRENGTHS))]


def of_miniature(server: ComfyServer, output: Path) -> list[Shown]:
    def drawn(instructions: Sequence[str], *strengths: Strengths) -> list[Image.Image]:
        [pictures] = _draw(server, edit_graph(MINIATURE, SCENE.name, instructions, strengths))
        return pictures

    one = drawn([SIZE], STRENGTHS)
    grid = list(product(FIVE, repeat=2))
    two = drawn([COLOUR, SIZE], *zip(*grid))
    three = drawn([COLOUR, SIZE, GROUND], 1.0, STRENGTHS, 1.0)
    before, after = _draw(server, calibrated_graph(MINIATURE, SCENE.name, SIZE, NINE), PICTURE, CALIBRATED)
    [projected] = _draw(server, projector_graph(MINIATURE, SCENE.name, COLOUR, FIVE))
    [parallel] = _draw(server, parallel_graph(MINIATURE, SCENE.name, [COLOUR, GROUND]))
    sheet = contact_sheet(two, [f"{a:g} / {b:g}" for a, b in grid], len(FIVE))
    captions = [f"{what} {one:g}" for what in ("strength", "calibrated") for one in FIVE]
    even = contact_sheet([*before[::2], *after[::2]], captions, len(FIVE))
    return [
        Shown("One slider", SIZE, _strip(output / "one-slider.png", one, STRENGTHS)),
        Shown("The same, moving", SIZE, _animation(output / "one-slider.webp", drawn([SIZE], MANY))),
        Shown("Two sliders", f"{COLOUR} (down) and {SIZE} (across)", _saved(sheet, output / "two-sliders.png")),
        Shown(
            "One of three",
            f"{SIZE} moves; {COLOUR} and {GROUND} stay at 1",
            _strip(output / "one-of-three.png", three, STRENGTHS),
        ),
        Shown(
            "Calibrated",
            f"{SIZE}: above by its strength, below by the position on the curve that nine pictures gave",
            _saved(even, output / "calibrated.png"),
        ),
        Shown(
            "One slider for the whole instruction",
            f"{COLOUR}, by a strength projector",
            _strip(output / "projector.png", projected, FIVE),
        ),
        Shown(
            "Without an adapter",
            "Stable Flow: the source and its edits in one batch, with the source's keys and values in the vital layers",
            _saved(contact_sheet(parallel, ["source", COLOUR, GROUND], 3), output / "without-adapter.png"),
        ),
    ]


def server_with_miniature(comfyui: Path, base: Path) -> ComfyServer:
    """A ComfyUI with the pack, the miniature model and what loads its text encoders."""
    packs = {**PACK, "small_text_encoders": ROOT / "demo" / "small_text_encoders"}
    return ComfyServer(comfyui, base, packs, extra_model_paths=_in(MINIATURE_FOLDER))


def _server(comfyui: Path, base: Path, found: Models | None) -> ComfyServer:
    if found is None:
        print("starting ComfyUI")
        return server_with_miniature(comfyui, base)
    python = users_python(comfyui)
    print(f"starting ComfyUI with {python}, {found.model} and {found.adapter}")
    cpu = not has_accelerator(python)
    return ComfyServer(comfyui, base, PACK, python=python, cpu=cpu, extra_model_paths=_in(comfyui / "models"))


def _in(models: Path) -> dict[str, str]:
    return {name: str(models / name) for name in MODEL_FOLDERS}


def _stay_open(server: ComfyServer, models: Models) -> None:
    graph = workflow(models, SCENE.name, [COLOUR, SIZE]) if models.miniature else workflow(models, PHOTO.name, [])
    server.put_workflow(NAME, graph)
    print(f"\nOpen {server.url} and choose {NAME} in the workflows (key w). Ctrl-C ends it.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


def _draw(server: ComfyServer, graph: Graph, *shown: str) -> list[list[Image.Image]]:
    """The pictures of some nodes; of PICTURE, if none is named."""
    started = time.monotonic()
    result = server.run(graph, timeout=3600)
    if result.error:
        sys.exit(f"{result.error['node_type']}: {result.error['exception_message']}")
    pictures = [list(map(_enlarged, result.images(node))) for node in shown or (PICTURE,)]
    print(f"{sum(map(len, pictures))} pictures, {time.monotonic() - started:.1f} s")
    return pictures


def _enlarged(picture: Image.Image) -> Image.Image:
    return picture if picture.width >= SIDE else picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _strip(file: Path, pictures: Sequence[Image.Image], strengths: Sequence[float]) -> Path:
    return _saved(contact_sheet(pictures, [f"strength {one:g}" for one in strengths], len(pictures)), file)


def _saved(picture: Image.Image, file: Path) -> Path:
    picture.save(file)
    return file


def _animation(file: Path, pictures: Sequence[Image.Image]) -> Path:
    file.write_bytes(animated_webp(pictures, {}))
    return file


if __name__ == "__main__":
    main()
