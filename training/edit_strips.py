"""Edit strips: edits at several strengths in the file layout of Kontinuous Kontext, and its filters (A.1).

An edit strip is an image of nine square columns: source, reconstruction of the source, five intermediate strengths,
reconstruction of the edit, edit. The projector is trained on the seven inner columns. A JSON record of the same name
contains the instruction and the distances between columns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from slider_core.errors import SliderError
from slider_core.metrics.smoothness import kl_to_uniform, total_change

from .errors import TrainingError

NUM_STRENGTHS = 7
NUM_COLUMNS = NUM_STRENGTHS + 2
CATEGORY_THRESHOLDS = {
    "stylization": (0.10, 0.55),
    "environment_change": (0.10, 0.55),
    "reimagining": (0.10, 0.52),
    "appearance_change": (0.020, 0.50),
    "material_change": (0.020, 0.50),
    "attribute_change": (0.030, 0.45),
    "object_morphing": (0.030, 0.45),
}
"""Category -> (min LPIPS(source, edit), max LPIPS(edit, reconstruction))."""
MAX_KL = 0.15


class EditStrip(NamedTuple):
    """strengths: column index -> strength, for the inner columns."""

    file: Path
    num_columns: int
    instruction: str
    strengths: Mapping[int, float]


def read_edit_strips(folder: Path, max_kl: float, category_thresholds: bool) -> list[EditStrip]:
    """The edit strips of a folder that pass the filters.

    Raises TrainingError with the reasons if none does, and for invalid records.
    """
    records = sorted(folder.glob("*.json")) if folder.is_dir() else []
    strips: list[EditStrip] = []
    rejected: Counter[str] = Counter()
    for file in records:
        record = read_record(file)
        if reason := rejection_reason(record, max_kl, category_thresholds):
            rejected[reason] += 1
            continue
        strengths = even_strengths(record["lpips_sequence"][1:-1])
        image = file.parent / record["image_name"]
        strips.append(EditStrip(image, NUM_COLUMNS, record["edit_instruction"], dict(enumerate(strengths, 1))))
    if not strips:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in rejected.most_common()) or "it contains none"
        raise TrainingError(
            f"{folder} has no usable edit strip: {reasons}. Make edit strips with 'python -m training prepare'."
        )
    return strips


def rejection_reason(record: Mapping[str, Any], max_kl: float, category_thresholds: bool) -> str:
    """Why an edit strip is not used for training (Kontinuous Kontext, A.1); empty if it is used."""
    try:
        if kl_to_uniform(record["lpips_sequence"]) > max_kl:
            return "changes unevenly"
        even_strengths(record["lpips_sequence"][1:-1])
    except SliderError:
        return "does not change"
    if category_thresholds and not passes_category_thresholds(
        record.get("category", ""), record["lpips_kontext_edit"], record["lpips_edit_inversion"]
    ):
        return "edit too weak or poorly reconstructed"
    return ""


def even_strengths(adjacent: Sequence[float]) -> list[float]:
    """Strengths 0 to 1 of the images of a sequence, one more than distances: cumulative distance over the total.

    Raises SliderError when nothing changes.
    """
    total = total_change(adjacent)
    return [length / total for length in accumulate(adjacent, initial=0.0)]


def passes_category_thresholds(category: str, edit_distance: float, reconstruction_distance: float) -> bool:
    """edit_distance: LPIPS(source, edit). reconstruction_distance: LPIPS(edit, its reconstruction)."""
    min_edit, max_reconstruction = CATEGORY_THRESHOLDS.get(category, (0.0, float("inf")))
    return edit_distance >= min_edit and reconstruction_distance <= max_reconstruction


def make_strip(images: Sequence[Image.Image]) -> Image.Image:
    """Images of the same size, side by side."""
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for k, image in enumerate(images):
        strip.paste(image, (k * width, 0))
    return strip


def read_record(file: Path) -> dict[str, Any]:
    """The record of an edit strip. Raises TrainingError when the file is not a valid record."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        sequence = [float(value) for value in record["lpips_sequence"]]
        ends = {key: float(record[key]) for key in ("lpips_kontext_edit", "lpips_edit_inversion")}
        has_texts = isinstance(record["edit_instruction"], str) and isinstance(record["image_name"], str)
        if len(sequence) != NUM_COLUMNS - 1 or not has_texts:
            raise ValueError(f"{len(sequence)} distances")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{file.name} is not the record of an edit strip ({type(error).__name__}: {error}); expected image_name, "
            f"edit_instruction, category, lpips_kontext_edit, lpips_edit_inversion and lpips_sequence with "
            f"{NUM_COLUMNS - 1} distances."
        ) from error
    return {**record, **ends, "lpips_sequence": sequence}
