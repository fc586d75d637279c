"""Adapter files: written in the format that ComfyUI and the nodes load, exported to the formats of the papers' code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from slider_core.atomic_write import atomic_write
from slider_core.tensor_file import read_tensors

from .errors import TrainingError
from .trainable import Tensors

LORA_PREFIX = "transformer."
METADATA_KEY = "edit_sliders"
STRENGTH_MEANING = "strength 0 = full adapter, 1 = adapter off, above 1 = adapter subtracted"
_PROJECTOR_PREFIXES = ("pe_extender.", "projector.")
_FORMER_KEYS = {
    "base": "model",
    "base file": "model_file",
    "targets": "target_modules",
    "sign": "strength_meaning",
    "text rows": "max_sequence_length",
    "dataset": "dataset_hash",
    "pack version": "pack_version",
}
"""Metadata keys in files of earlier versions -> their current names."""


def write_adapter(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> None:
    """Write LoRA factors and projector, in float32, atomically into one safetensors file."""
    named = {
        name if name.startswith(_PROJECTOR_PREFIXES) else LORA_PREFIX + name: tensor.contiguous()
        for name, tensor in tensors.items()
    }
    atomic_write(file, save(named, {METADATA_KEY: json.dumps(metadata), "format": "pt"}))


def read_metadata(file: Path) -> dict[str, object]:
    """The metadata of a file trained here, with current keys; empty for other files. Raises SliderError."""
    metadata: Any = json.loads(read_tensors(file, "an adapter").header.get(METADATA_KEY, "{}"))
    if not isinstance(metadata, dict):
        return {}
    return {_FORMER_KEYS.get(str(key), str(key)): value for key, value in metadata.items()}


def export_adapter(file: Path, folder: Path) -> list[Path]:
    """Write an adapter trained here in the format of its paper's code. Returns the written files.

    Raises SliderError when the file cannot be read, TrainingError when it has no method in its metadata.
    """
    tensors = read_tensors(file, "an adapter trained here").tensors
    method = read_metadata(file).get("method")
    lora = {name.removeprefix(LORA_PREFIX): t for name, t in tensors.items() if name.startswith(LORA_PREFIX)}
    projector = {name: tensor for name, tensor in tensors.items() if name.startswith(_PROJECTOR_PREFIXES)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if method == "stlora":
        written.append(_write_torch_file(folder / "selective_lora.pt", lora))
    elif method in ("gstlora", "projector"):
        written.append(folder / "pytorch_lora_weights.safetensors")
        prefixed = {LORA_PREFIX + name: tensor.contiguous() for name, tensor in lora.items()}
        atomic_write(written[-1], save(prefixed, {"format": "pt"}))
        if method == "projector":
            written.append(_write_torch_file(folder / "slider_projector.pth", projector))
    else:
        raise TrainingError(
            f"The metadata of {file.name} does not name a known training method ({method!r}); expected a file written "
            "by 'python -m training train'."
        )
    return written


def _write_torch_file(file: Path, tensors: Tensors) -> Path:
    import io

    content = io.BytesIO()
    torch.save(tensors, content)
    atomic_write(file, content.getvalue())
    return file
