"""Edits at many strengths, rendered by a real ComfyUI, and a page that shows them.

If COMFYUI_PATH has FLUX.1 Kontext, its text encoders and VAE, and a SliderEdit adapter: a photograph, with one slider.
Otherwise a miniature edit model that was trained on images of a circle and a square: one slider, two sliders as a grid,
one of three sliders, a slider before and after calibration, a strength projector, and edits without an adapter.

    python run.py demo            render the images and the page
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

from graph import CALIBRATED, IMAGE, Graph, Strengths, calibrated_graph, edit_graph, parallel_graph, projector_graph
from models import MINIATURE, MINIATURE_FOLDER, Models, find_user_models, find_user_python, has_accelerator
from page import Figure, write_page
from PIL import Image
from workflow import NAME, workflow

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

from support.comfy_server import ComfyServer  # noqa: E402

from slider_core.figures.contact_sheet import contact_sheet, encode_webp  # noqa: E402

PHOTO, SCENE = ROOT / "demo" / "photo.jpg", ROOT / "demo" / "scene.png"
OUTPUT = ROOT / "demo" / "output"
PHOTO_INSTRUCTION = "turn the cat into a golden statue with emerald eyes that shine in the evening sun"
COLOR, SIZE, BACKGROUND = "make the circle red", "make the square bigger", "make the background dark"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
FIVE = (0.0, 0.25, 0.5, 0.75, 1.0)
NINE = tuple(k / 8 for k in range(9))
ANIMATION_STRENGTHS = tuple(k / 20 for k in range(21))
MIN_SIZE = 192
PACK = {"ComfyUI-EditSliders": ROOT}
MODEL_FOLDERS = ("diffusion_models", "unet", "text_encoders", "clip", "vae", "vae_approx", "loras")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open", action="store_true", help="keep ComfyUI running, with the graph among its workflows")
    args = parser.parse_args()
    comfyui = Path(os.environ["COMFYUI_PATH"])
    user_models, missing = find_user_models(comfyui / "models")
    if user_models is None:
        print(f"FLUX.1 Kontext is incomplete in {comfyui / 'models'}; missing: {', '.join(missing)}.")
        print("Using the miniature model instead: 64x64 images of a circle and a square.")
    with tempfile.TemporaryDirectory(prefix="edit-sliders-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        with _start_server(comfyui, base, user_models) as server:
            for image in (PHOTO, SCENE):
                shutil.copy(image, base / "input")
            if args.open:
                _serve(server, user_models or MINIATURE)
            else:
                OUTPUT.mkdir(exist_ok=True)
                if user_models:
                    figures = render_photograph(server, user_models, OUTPUT)
                else:
                    figures = render_miniature(server, OUTPUT)
                page = write_page(OUTPUT / "index.html", figures)
                print(*(figure.file for figure in figures), page, sep="\n")


def render_photograph(server: ComfyServer, models: Models, output: Path) -> list[Figure]:
    graphs = [edit_graph(models, PHOTO.name, [PHOTO_INSTRUCTION], [strength]) for strength in STRENGTHS]
    images = [_render(server, graph)[0][0] for graph in graphs]
    return [Figure("One slider", PHOTO_INSTRUCTION, _strip(output / "one-slider.png", images, STRENGTHS))]


def render_miniature(server: ComfyServer, output: Path) -> list[Figure]:
    def render(instructions: Sequence[str], *strengths: Strengths) -> list[Image.Image]:
        [images] = _render(server, edit_graph(MINIATURE, SCENE.name, instructions, strengths))
        return images

    one = render([SIZE], STRENGTHS)
    grid = list(product(FIVE, repeat=2))
    two = render([COLOR, SIZE], *zip(*grid))
    three = render([COLOR, SIZE, BACKGROUND], 1.0, STRENGTHS, 1.0)
    before, after = _render(server, calibrated_graph(MINIATURE, SCENE.name, SIZE, NINE), IMAGE, CALIBRATED)
    [projected] = _render(server, projector_graph(MINIATURE, SCENE.name, COLOR, FIVE))
    [parallel] = _render(server, parallel_graph(MINIATURE, SCENE.name, [COLOR, BACKGROUND]))
    sheet = contact_sheet(two, [f"{a:g} / {b:g}" for a, b in grid], len(FIVE))
    captions = [f"{label} {value:g}" for label in ("strength", "calibrated") for value in FIVE]
    even = contact_sheet([*before[::2], *after[::2]], captions, len(FIVE))
    return [
        Figure("One slider", SIZE, _strip(output / "one-slider.png", one, STRENGTHS)),
        Figure("The same, animated", SIZE, _animation(output / "one-slider.webp", render([SIZE], ANIMATION_STRENGTHS))),
        Figure("Two sliders", f"{COLOR} (vertical) and {SIZE} (horizontal)", _save(sheet, output / "two-sliders.png")),
        Figure(
            "One of three",
            f"{SIZE} moves; {COLOR} and {BACKGROUND} stay at 1",
            _strip(output / "one-of-three.png", three, STRENGTHS),
        ),
        Figure(
            "Calibrated",
            f"{SIZE}: top row by strength, bottom row by position on the calibration curve of nine images",
            _save(even, output / "calibrated.png"),
        ),
        Figure(
            "One slider for the whole instruction",
            f"{COLOR}, with a strength projector",
            _strip(output / "projector.png", projected, FIVE),
        ),
        Figure(
            "Without an adapter",
            "Stable Flow: the source and its edits in one batch, with the source's K and V in the vital layers",
            _save(contact_sheet(parallel, ["source", COLOR, BACKGROUND], 3), output / "without-adapter.png"),
        ),
    ]


def server_with_miniature(comfyui: Path, base: Path) -> ComfyServer:
    """A ComfyUI server with the pack, the miniature model and the loader of its text encoders."""
    packs = {**PACK, "small_text_encoders": ROOT / "demo" / "small_text_encoders"}
    return ComfyServer(comfyui, base, packs, extra_model_paths=_model_paths(MINIATURE_FOLDER))


def _start_server(comfyui: Path, base: Path, models: Models | None) -> ComfyServer:
    if models is None:
        print("starting ComfyUI")
        return server_with_miniature(comfyui, base)
    python = find_user_python(comfyui)
    print(f"starting ComfyUI with {python}, {models.model} and {models.adapter}")
    cpu = not has_accelerator(python)
    return ComfyServer(comfyui, base, PACK, python=python, cpu=cpu, extra_model_paths=_model_paths(comfyui / "models"))


def _model_paths(models: Path) -> dict[str, str]:
    return {name: str(models / name) for name in MODEL_FOLDERS}


def _serve(server: ComfyServer, models: Models) -> None:
    graph = workflow(models, SCENE.name, [COLOR, SIZE]) if models.miniature else workflow(models, PHOTO.name, [])
    server.put_workflow(NAME, graph)
    print(f"\nOpen {server.url} and choose {NAME} among the workflows (key w). Press Ctrl-C to stop.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


def _render(server: ComfyServer, graph: Graph, *nodes: str) -> list[list[Image.Image]]:
    """Run a graph; the images of each of `nodes`, which is IMAGE by default."""
    started = time.monotonic()
    result = server.run(graph, timeout=3600)
    if result.error:
        sys.exit(f"{result.error['node_type']}: {result.error['exception_message']}")
    images = [list(map(_enlarge, result.images(node))) for node in nodes or (IMAGE,)]
    print(f"{sum(map(len, images))} images, {time.monotonic() - started:.1f} s")
    return images


def _enlarge(image: Image.Image) -> Image.Image:
    return image if image.width >= MIN_SIZE else image.resize((MIN_SIZE, MIN_SIZE), Image.Resampling.BICUBIC)


def _strip(file: Path, images: Sequence[Image.Image], strengths: Sequence[float]) -> Path:
    return _save(contact_sheet(images, [f"strength {strength:g}" for strength in strengths], len(images)), file)


def _save(image: Image.Image, file: Path) -> Path:
    image.save(file)
    return file


def _animation(file: Path, images: Sequence[Image.Image]) -> Path:
    file.write_bytes(encode_webp(images, {}))
    return file


if __name__ == "__main__":
    main()
