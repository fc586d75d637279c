"""Draw one photograph's edit at several strengths, side by side, with a real ComfyUI.

With the FLUX.1 Kontext, text encoders, VAE and SliderEdit adapter of COMFYUI_PATH if they are all there; otherwise with
a tiny random model, which knows nothing about pictures and only shows the machinery.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from graph import PICTURE, strip_graph
from models import TINY, Models, has_accelerator, users_models, users_python
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

from support.comfy_server import ComfyServer  # noqa: E402
from support.tiny_models import write_tiny_models  # noqa: E402

from slider_core.contact_sheet import contact_sheet  # noqa: E402

PHOTO = ROOT / "demo" / "photo.jpg"
OUTPUT = ROOT / "demo" / "output"
INSTRUCTION = "turn the cat into a golden statue with emerald eyes that shine in the evening sun"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
PLAINLY = "tiny random model: this shows the machinery, not an edit"


def main() -> None:
    comfyui = Path(os.environ["COMFYUI_PATH"])
    found, missing = users_models(comfyui / "models")
    if found is None:
        print(f"No complete FLUX.1 Kontext in {comfyui / 'models'}: no {', '.join(missing)}.")
        print("Using a tiny random model instead: it only shows the machinery and knows nothing about pictures.")
    with tempfile.TemporaryDirectory(prefix="edit-sliders-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        packs = {"ComfyUI-EditSliders": ROOT, "tiny_loaders": ROOT / "tests" / "support" / "tiny_loaders"}
        with _server(comfyui, base, packs, found) as server:
            shutil.copy(PHOTO, base / "input")
            pictures = [edit(server, found or TINY, strength) for strength in STRENGTHS]
    OUTPUT.mkdir(exist_ok=True)
    for strength, picture in zip(STRENGTHS, pictures):
        save(picture, f"strength-{strength:.2f}.png")
    captions = [f"strength {strength:g}" for strength in STRENGTHS]
    save(contact_sheet(pictures, captions, len(pictures), "" if found else PLAINLY), "strip.png")


def _server(comfyui: Path, base: Path, packs: dict[str, Path], found: Models | None) -> ComfyServer:
    if found is None:
        write_tiny_models(base / "models")
        print("starting ComfyUI")
        return ComfyServer(comfyui, base, packs)
    python = users_python(comfyui)
    folders = ("diffusion_models", "unet", "text_encoders", "clip", "vae", "loras")
    print(f"starting ComfyUI with {python}, {found.model} and {found.adapter}")
    return ComfyServer(
        comfyui,
        base,
        packs,
        python=python,
        cpu=not has_accelerator(python),
        extra_model_paths={name: str(comfyui / "models" / name) for name in folders},
    )


def edit(server: ComfyServer, models: Models, strength: float) -> Image.Image:
    started = time.monotonic()
    result = server.run(strip_graph(models, PHOTO.name, INSTRUCTION, strength), timeout=3600)
    if result.error:
        sys.exit(f"{result.error['node_type']}: {result.error['exception_message']}")
    print(f"strength {strength:g}: {len(result.executed)} nodes ran, {time.monotonic() - started:.1f} s")
    return result.images(PICTURE)[0]


def save(picture: Image.Image, name: str) -> None:
    picture.save(OUTPUT / name)
    print(OUTPUT / name)


if __name__ == "__main__":
    main()
