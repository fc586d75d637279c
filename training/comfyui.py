"""Makes ComfyUI's loaders, text encoders and samplers importable, without its server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import TrainingError

_INSTALLED = Path(__file__).resolve().parents[3]
"""ComfyUI's folder if the pack is in its custom_nodes."""


def use_comfyui(folder: Path | None, cpu: bool, extra_models: Path | None = None) -> None:
    """Make `comfy` importable and configure it for gradients. Call this before any import of `comfy`.

    folder: ComfyUI's folder; None = the variable COMFYUI_PATH, else the ComfyUI that the pack is installed in. cpu: do
    not use a GPU. extra_models: another models folder. Raises TrainingError when a folder is missing.
    """
    comfyui = Path(folder or os.environ.get("COMFYUI_PATH") or _INSTALLED).expanduser().resolve()
    if not (comfyui / "comfy" / "sd.py").is_file():
        raise TrainingError(
            f"{comfyui} is not a ComfyUI folder: expected main.py and a folder comfy in it. Set the "
            "environment variable COMFYUI_PATH, or model.comfyui in a training config, to ComfyUI's folder."
        )
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    args = comfy.cli_args.args
    args.cpu = cpu or not _has_gpu()
    args.use_pytorch_cross_attention = True  # other kernels have no gradients, or approximate ones
    args.disable_async_offload = True  # reuses weight buffers that the backward pass still needs
    import comfy.model_management

    comfy.model_management.in_training = True
    _add_model_folders(comfyui, extra_models)


def model_file(folder: str, name: str) -> Path:
    """The file of a model given by path or by its name in one of ComfyUI's model folders. Raises TrainingError."""
    import folder_paths

    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    file = folder_paths.get_full_path(folder, name)
    if file is None:
        files = ", ".join(folder_paths.get_filename_list(folder)) or "no files"
        raise TrainingError(f"{name!r} is not in ComfyUI's folder {folder!r}, which contains: {files}.")
    return Path(file)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def _add_model_folders(comfyui: Path, extra_models: Path | None) -> None:
    import folder_paths
    from utils.extra_config import load_extra_path_config

    extra_paths = comfyui / "extra_model_paths.yaml"
    if extra_paths.is_file():
        load_extra_path_config(str(extra_paths))
    if extra_models and not extra_models.is_dir():
        raise TrainingError(
            f"model.extra_models_folder is {extra_models}, which is not a folder; expected one with diffusion_models, "
            "text_encoders and so on in it."
        )
    for folder in extra_models.iterdir() if extra_models else ():
        folder_paths.add_model_folder_path(folder.name, str(folder))
