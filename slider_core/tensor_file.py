"""Files of named tensors, read without running anything that is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import comfy.utils
import torch

from .errors import SliderError


class TensorFile(NamedTuple):
    """Tensors by name, and the header of a safetensors file (empty for others)."""

    tensors: dict[str, torch.Tensor]
    header: Mapping[str, str]


def read_tensors(path: str | Path, wanted: str) -> TensorFile:
    """Read a .safetensors file, or a torch file that holds nothing but tensors.

    wanted: what the file should be, for messages. Raises SliderError when it cannot be read or holds anything else.
    """
    name = Path(path).name
    if not Path(path).is_file():
        raise SliderError(f"{name} is not there any more; expected {wanted}. Choose another file.")
    try:
        tensors, header = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except Exception as error:
        raise SliderError(
            f"{name} cannot be read as {wanted} ({type(error).__name__}): it is damaged, cut off, or holds more than "
            "tensors. Expected a .safetensors file or a torch file that holds tensors only. Download it again."
        ) from error
    if not isinstance(tensors, dict) or not tensors:
        raise SliderError(f"{name} holds no table of tensors; expected {wanted}.")
    strange = [key for key, value in tensors.items() if not isinstance(key, str) or not torch.is_tensor(value)]
    if strange:
        raise SliderError(f"{name} holds {strange[0]!r}, which is no tensor; expected {wanted}.")
    empty = [key for key, value in tensors.items() if value.layout != torch.strided or value.is_meta]
    if empty:
        raise SliderError(f"{name} holds {empty[0]!r} as a sparse or empty tensor; expected {wanted}.")
    return TensorFile(tensors, header or {})
