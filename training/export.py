"""Trained adapters as files: our own, which ComfyUI and the nodes load, and the authors' layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from slider_core.atomic_write import atomic_write
from slider_core.errors import SliderError
from slider_core.tensor_file import read_tensors

from .errors import TrainingError
from .trainable import Tensors

LORA_PREFIX = "transformer."
METADATA = "edit_sliders"
SIGN = "strength 0 = adapter in full, 1 = adapter off, above 1 = subtracted"
_PROJECTOR_PARTS = ("pe_extender.", "projector.")


def write_adapter(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> None:
    """Write factors and projector, float32, into one safetensors file, in full or not at all."""
    named = {
        name if name.startswith(_PROJECTOR_PARTS) else LORA_PREFIX + name: tensor.contiguous()
        for name, tensor in tensors.items()
    }
    atomic_write(file, save(named, {METADATA: json.dumps(metadata), "format": "pt"}))


def read_metadata(file: Path) -> dict[str, object]:
    """What a file trained here tells of itself; empty for others. Raises TrainingError when it cannot be read."""
    try:
        content = json.loads(read_tensors(file, "an adapter").header.get(METADATA, "{}"))
    except SliderError as error:
        raise TrainingError(str(error)) from error
    return content if isinstance(content, dict) else {}


def export(file: Path, folder: Path) -> list[Path]:
    """Write an adapter in the layout of its paper's own code. Returns the files; raises TrainingError if it cannot."""
    try:
        tensors = read_tensors(file, "an adapter trained here").tensors
    except SliderError as error:
        raise TrainingError(str(error)) from error
    method = read_metadata(file).get("method")
    lora = {name.removeprefix(LORA_PREFIX): t for name, t in tensors.items() if name.startswith(LORA_PREFIX)}
    projector = {name: tensor for name, tensor in tensors.items() if name.startswith(_PROJECTOR_PARTS)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if method == "stlora":
        written.append(_torch_file(folder / "selective_lora.pt", lora))
    elif method in ("gstlora", "projector"):
        written.append(folder / "pytorch_lora_weights.safetensors")
        prefixed = {LORA_PREFIX + name: tensor.contiguous() for name, tensor in lora.items()}
        atomic_write(written[-1], save(prefixed, {"format": "pt"}))
        if method == "projector":
            written.append(_torch_file(folder / "slider_projector.pth", projector))
    else:
        raise TrainingError(
            f"{file.name} does not say by which method it was trained ({method!r}); expected a file made by "
            "'python -m training train'."
        )
    return written


def _torch_file(file: Path, tensors: Tensors) -> Path:
    import io

    content = io.BytesIO()
    torch.save(tensors, content)
    atomic_write(file, content.getvalue())
    return file
