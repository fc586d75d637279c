"""Which models the demo draws with: the user's FLUX.1 Kontext and slider adapter if they are there, else miniatures."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDERS = {
    "model": (("diffusion_models", "unet"), ("*kontext*.safetensors",)),
    "clip_l": (("text_encoders", "clip"), ("clip_l*.safetensors",)),
    "t5xxl": (("text_encoders", "clip"), ("t5xxl*.safetensors",)),
    "vae": (("vae",), ("ae.safetensors", "*flux*vae*.safetensors", "*flux*ae*.safetensors")),
    "adapter": (("loras",), ("selective_lora*.pt", "*stlora*.safetensors", "*selective*lora*.safetensors")),
}


@dataclass(frozen=True)
class Models:
    """File names as ComfyUI's loaders take them. The miniature's text encoders need a loader of their own."""

    model: str
    clip_l: str
    t5xxl: str
    vae: str
    adapter: str
    miniature: bool
    projector: str = ""


MINIATURE = Models(
    model="miniature-kontext.safetensors",
    clip_l="miniature-clip-l.safetensors",
    t5xxl="miniature-t5.safetensors",
    vae="taef1",
    adapter="miniature-stlora.safetensors",
    miniature=True,
    projector="miniature-projector.safetensors",
)
MINIATURE_FOLDER = Path(__file__).parent / "miniature"


def users_models(models: Path) -> tuple[Models | None, list[str]]:
    """The models in a ComfyUI's models folder, and what is missing there for the real demo."""
    found, missing = {}, []
    for kind, (folders, patterns) in FOLDERS.items():
        files = [f for folder in folders for pattern in patterns for f in sorted((models / folder).rglob(pattern))]
        if files:
            folder = next(f for f in folders if (models / f) in files[0].parents)
            found[kind] = str(files[0].relative_to(models / folder))
        else:
            missing.append(f"{' or '.join(folders)}/{patterns[0]}")
    return (None if missing else Models(miniature=False, **found)), missing


def users_python(comfyui: Path) -> str:
    """The python that the user's ComfyUI runs with, else this one."""
    if chosen := os.environ.get("COMFYUI_PYTHON"):
        return chosen
    places = (
        comfyui / "venv" / "bin" / "python",
        comfyui / ".venv" / "bin" / "python",
        comfyui / "venv" / "Scripts" / "python.exe",
        comfyui / ".venv" / "Scripts" / "python.exe",
        comfyui.parent / "python_embeded" / "python.exe",
    )
    return next((str(place) for place in places if place.is_file()), sys.executable)


def has_accelerator(python: str) -> bool:
    """Whether the torch of that python sees a GPU."""
    code = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return answer.stdout.strip() == "True"
