"""Reading files of named tensors (.safetensors, or torch files with weights only) without executing their content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import comfy.utils
import torch

from .errors import SliderError


class TensorFile(NamedTuple):
    """Content of a file. tensors: name -> tensor. header: metadata of a safetensors file; empty for torch files."""

    tensors: dict[str, torch.Tensor]
    header: Mapping[str, str]


def read_tensors(path: str | Path, expected: str) -> TensorFile:
    """Read a .safetensors file, or a torch file that contains only tensors.

    expected: what the file should be, with article, for messages.
    Raises SliderError if the file cannot be read or contains anything other than dense tensors.
    """
    name = Path(path).name
    if not Path(path).is_file():
        raise SliderError(f"{name} no longer exists; expected {expected}. Choose another file.")
    try:
        tensors, header = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except Exception as error:
        raise SliderError(
            f"{name} cannot be read as {expected} ({type(error).__name__}): it is damaged, truncated or contains more "
            "than tensors. Expected a .safetensors file, or a torch file that contains only tensors. Download it again."
        ) from error
    if not isinstance(tensors, dict) or not tensors:
        raise SliderError(f"{name} does not contain named tensors; expected {expected}. Choose another file.")
    others = [key for key, value in tensors.items() if not isinstance(key, str) or not torch.is_tensor(value)]
    if others:
        raise SliderError(
            f"{name} contains {others[0]!r}, which is not a tensor; expected {expected}. Choose another file."
        )
    not_dense = [key for key, value in tensors.items() if value.layout != torch.strided or value.is_meta]
    if not_dense:
        raise SliderError(
            f"{name} contains {not_dense[0]!r} as a sparse or empty tensor; expected {expected} with dense tensors. "
            "Choose another file."
        )
    return TensorFile(tensors, header or {})
