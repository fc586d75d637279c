"""Files of edit strips, written so that an incomplete or outdated strip never has a record."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from slider_core.atomic_write import atomic_write
from slider_core.metrics.smoothness import triangle_deficits

from ..edit_strips import NUM_COLUMNS, make_strip, read_record
from ..errors import TrainingError
from .distances import Distance


class StripFiles:
    """The image and the record of one edit strip. The record is written last and removed first."""

    def __init__(self, folder: Path, name: str):
        self.image = folder / f"{name}.png"
        self.record = folder / f"{name}.json"

    def read_record(self) -> Mapping[str, Any]:
        """The record; empty when it is missing or invalid, or when the image is missing."""
        if not self.image.is_file() or not self.record.is_file():
            return {}
        try:
            return read_record(self.record)
        except TrainingError:
            return {}

    def read_columns(self) -> list[Image.Image]:
        """The columns of the image. Raises OSError when the file is damaged."""
        with Image.open(self.image) as content:
            strip = content.convert("RGB")
        width = strip.width // NUM_COLUMNS
        return [strip.crop((k * width, 0, (k + 1) * width, strip.height)) for k in range(NUM_COLUMNS)]

    def write(self, columns: Sequence[Image.Image], record: Mapping[str, Any]) -> None:
        """Write both files. columns: from source to edit, of the same size. Raises OSError, ValueError for NaN."""
        content = io.BytesIO()
        make_strip(columns).save(content, "PNG")
        self.record.unlink(missing_ok=True)
        atomic_write(self.image, content.getvalue())
        self.write_record(record)

    def write_record(self, record: Mapping[str, Any]) -> None:
        content = {"image_name": self.image.name, **record}
        atomic_write(self.record, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())


def measure_strip(columns: Sequence[Image.Image], distance: Distance) -> dict[str, Any]:
    """The distances in a record, with the keys of Kontinuous Kontext. An infinite triangle deficit is null in JSON."""
    adjacent = [distance(a, b) for a, b in pairwise(columns)]
    deficits = triangle_deficits(adjacent, [distance(a, b) for a, b in zip(columns, columns[2:])])
    return {
        "lpips_kontext_edit": distance(columns[-1], columns[0]),
        "lpips_edit_inversion": adjacent[-1],
        "lpips_inversion_edit": distance(columns[-2], columns[1]),
        "lpips_sequence": adjacent,
        "lpips_sequence_triangle": [value if math.isfinite(value) else None for value in deficits],
    }
