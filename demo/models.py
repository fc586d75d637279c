"""The models of the demo: the user's FLUX.1 Kontext and slider adapter if both exist, else the miniature model."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FILES = {
    "model": (("diffusion_models", "unet"), ("*kontext*.safetensors",)),
    "clip_l": (("text_encoders", "clip"), ("clip_l*.safetensors",)),
    "t5xxl": (("text_encoders", "clip"), ("t5xxl*.safetensors",)),
    "vae": (("vae",), ("ae.safetensors", "*flux*vae*.safetensors", "*flux*ae*.safetensors")),
    "adapter": (("loras",), ("selective_lora*.pt", "*stlora*.safetensors", "*selective*lora*.safetensors")),
}


@dataclass(frozen=True)
class Models:
    """File names as ComfyUI's loaders take them. The miniature's text encoders need a custom loader."""

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


def find_user_models(models: Path) -> tuple[Models | None, list[str]]:
    """The user's models in ComfyUI's models folder, or None and the missing files."""
    names, missing = {}, []
    for role, (folders, patterns) in FILES.items():
        files = [f for folder in folders for pattern in patterns for f in sorted((models / folder).rglob(pattern))]
        if files:
            folder = next(f for f in folders if (models / f) in files[0].parents)
            names[role] = str(files[0].relative_to(models / folder))
        else:
            missing.append(f"{' or '.join(folders)}/{patterns[0]}")
    return (None if missing else Models(miniature=False, **names)), missing


def find_user_python(comfyui: Path) -> str:
    """The Python of the user's ComfyUI: COMFYUI_PYTHON, else a virtual or embedded one near ComfyUI, else this one."""
    if python := os.environ.get("COMFYUI_PYTHON"):
        return python
    candidates = (
        comfyui / "venv" / "bin" / "python",
        comfyui / ".venv" / "bin" / "python",
        comfyui / "venv" / "Scripts" / "python.exe",
        comfyui / ".venv" / "Scripts" / "python.exe",
        comfyui.parent / "python_embeded" / "python.exe",
    )
    return next((str(path) for path in candidates if path.is_file()), sys.executable)


def has_accelerator(python: str) -> bool:
    """Whether torch in this Python has a GPU."""
    code = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return result.stdout.strip() == "True"
