"""The ComfyUI whose loaders, text encoders and samplers the training uses, in this process and without its server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import TrainingError

_INSTALLED = Path(__file__).resolve().parents[3]
"""Where ComfyUI lies when the pack lies in its custom_nodes."""


def use_comfyui(chosen: Path | None, cpu: bool, models: Path | None = None) -> None:
    """Make `comfy` importable, before anything of it is imported, and prepare it for gradients.

    chosen: a ComfyUI; None = COMFYUI_PATH, else the one the pack is installed in. cpu: leave every GPU alone.
    models: one more folder of models.
    Raises TrainingError when there is none.
    """
    comfyui = Path(chosen or os.environ.get("COMFYUI_PATH") or _INSTALLED).expanduser().resolve()
    if not (comfyui / "comfy" / "sd.py").is_file():
        raise TrainingError(
            f"{comfyui} is no ComfyUI: expected main.py beside a folder comfy. Set base.comfyui in the config or the "
            "variable COMFYUI_PATH to its folder."
        )
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    args = comfy.cli_args.args
    args.cpu = cpu or not _has_gpu()
    args.use_pytorch_cross_attention = True  # the other ones have no gradients, or only approximate ones
    args.disable_async_offload = True  # it reuses buffers for weights that the backward pass still needs
    import comfy.model_management

    comfy.model_management.in_training = True
    _read_model_folders(comfyui, models)


def model_file(folder: str, name: str) -> Path:
    """A model file: a path, or a name in one of ComfyUI's model folders. Raises TrainingError when there is none."""
    import folder_paths

    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        known = ", ".join(folder_paths.get_filename_list(folder)) or "nothing"
        raise TrainingError(f"{name!r} is not in ComfyUI's folder {folder!r}, which holds: {known}.")
    return Path(found)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def _read_model_folders(comfyui: Path, models: Path | None) -> None:
    import folder_paths
    from utils.extra_config import load_extra_path_config

    more = comfyui / "extra_model_paths.yaml"
    if more.is_file():
        load_extra_path_config(str(more))
    if models and not models.is_dir():
        raise TrainingError(
            f"base.models is {models}, which is no folder; expected one with diffusion_models and so on."
        )
    for folder in models.iterdir() if models else ():
        folder_paths.add_model_folder_path(folder.name, str(folder))
