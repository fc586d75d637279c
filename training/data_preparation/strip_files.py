"""Stacks of pictures with their records, as files that are never half there."""

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

from ..edit_strips import COLUMNS, read_record, stacked
from ..errors import TrainingError
from .distances import Distance


class StackFiles:
    """The picture and the record of one stack; the record is written last and removed first."""

    def __init__(self, folder: Path, name: str):
        self.picture = folder / f"{name}.png"
        self.record = folder / f"{name}.json"

    def known(self) -> Mapping[str, Any]:
        """Its record; empty when there is none, or no picture with it."""
        if not self.picture.is_file() or not self.record.is_file():
            return {}
        try:
            return read_record(self.record)
        except TrainingError:
            return {}

    def pictures(self) -> list[Image.Image]:
        """The columns. Raises OSError when the file is damaged."""
        with Image.open(self.picture) as row:
            whole = row.convert("RGB")
        width = whole.width // COLUMNS
        return [whole.crop((k * width, 0, (k + 1) * width, whole.height)) for k in range(COLUMNS)]

    def write(self, pictures: Sequence[Image.Image], record: Mapping[str, Any]) -> None:
        """Both files. pictures: source to edit, of one size."""
        content = io.BytesIO()
        stacked(pictures).save(content, "PNG")
        self.record.unlink(missing_ok=True)
        atomic_write(self.picture, content.getvalue())
        self.write_record(record)

    def write_record(self, record: Mapping[str, Any]) -> None:
        whole = {"image_name": self.picture.name, **record}
        atomic_write(self.record, json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False).encode())


def measured(pictures: Sequence[Image.Image], distance: Distance) -> dict[str, Any]:
    """The distances of a record; an infinite triangle deficit is null, as JSON has no infinity."""
    adjacent = [distance(a, b) for a, b in pairwise(pictures)]
    deficits = triangle_deficits(adjacent, [distance(a, b) for a, b in zip(pictures, pictures[2:])])
    return {
        "lpips_kontext_edit": distance(pictures[-1], pictures[0]),
        "lpips_edit_inversion": adjacent[-1],
        "lpips_inversion_edit": distance(pictures[-2], pictures[1]),
        "lpips_sequence": adjacent,
        "lpips_sequence_triangle": [value if math.isfinite(value) else None for value in deficits],
    }
