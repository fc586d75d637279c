"""Edits at several strengths as files: Kontinuous Kontext's layout, and which of them are good enough to learn from.

A stack is a row of nine square pictures: the source, its reconstruction, five between, the edit's reconstruction, the
edit. The seven inner ones are what the projector learns. A JSON record of the same name tells of it.
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

INNER = 7
COLUMNS = INNER + 2
THRESHOLDS = {  # category -> least distance of the edit from the source, most of the edit from its reconstruction
    "stylization": (0.10, 0.55),
    "environment_change": (0.10, 0.55),
    "reimagining": (0.10, 0.52),
    "appearance_change": (0.020, 0.50),
    "material_change": (0.020, 0.50),
    "attribute_change": (0.030, 0.45),
    "object_morphing": (0.030, 0.45),
}
MOST_KL = 0.15


class Stack(NamedTuple):
    """strengths: column -> strength, for those to learn from."""

    file: Path
    columns: int
    instruction: str
    strengths: Mapping[int, float]


def read_stacks(folder: Path, most_kl: float, category_thresholds: bool) -> list[Stack]:
    """The stacks of a folder that pass the filters. Raises TrainingError when none does, telling why."""
    records = sorted(folder.glob("*.json")) if folder.is_dir() else []
    kept: list[Stack] = []
    why: Counter[str] = Counter()
    for file in records:
        record = read_record(file)
        if reason := refusal(record, most_kl, category_thresholds):
            why[reason] += 1
            continue
        strengths = even_strengths(record["lpips_sequence"][1:-1])
        picture = file.parent / record["image_name"]
        kept.append(Stack(picture, COLUMNS, record["edit_instruction"], dict(enumerate(strengths, 1))))
    if not kept:
        told = "; ".join(f"{count} x {reason}" for reason, count in why.most_common()) or "there are none"
        raise TrainingError(f"{folder} has no stack to learn from: {told}. Make some by 'python -m training prepare'.")
    return kept


def refusal(record: Mapping[str, Any], most_kl: float, category_thresholds: bool) -> str:
    """Why a stack is not to be learned from (Kontinuous Kontext, A.1); empty if it is."""
    try:
        if kl_to_uniform(record["lpips_sequence"]) > most_kl:
            return "changes in jumps"
        even_strengths(record["lpips_sequence"][1:-1])
    except SliderError:
        return "does not change"
    if category_thresholds and not valid_ends(
        record.get("category", ""), record["lpips_kontext_edit"], record["lpips_edit_inversion"]
    ):
        return "edit too weak or too badly reconstructed"
    return ""


def even_strengths(adjacent: Sequence[float]) -> list[float]:
    """Strengths 0 to 1 of the images of a sequence, one more than distances: cumulative distance over the total.

    Raises SliderError when nothing changes.
    """
    total = total_change(adjacent)
    return [length / total for length in accumulate(adjacent, initial=0.0)]


def valid_ends(category: str, edit: float, reconstruction: float) -> bool:
    """Whether the edit is far enough from the source, and its reconstruction near enough to it, for its category."""
    least, most = THRESHOLDS.get(category, (0.0, float("inf")))
    return edit >= least and reconstruction <= most


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for k, picture in enumerate(pictures):
        row.paste(picture, (k * width, 0))
    return row


def read_record(file: Path) -> dict[str, Any]:
    """A stack's record. Raises TrainingError when the file is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        sequence = [float(value) for value in record["lpips_sequence"]]
        ends = {key: float(record[key]) for key in ("lpips_kontext_edit", "lpips_edit_inversion")}
        named = isinstance(record["edit_instruction"], str) and isinstance(record["image_name"], str)
        if len(sequence) != COLUMNS - 1 or not named:
            raise ValueError(f"{len(sequence)} distances")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{file.name} is no record of a stack ({type(error).__name__}: {error}); expected image_name, "
            f"edit_instruction, category, lpips_kontext_edit, lpips_edit_inversion and lpips_sequence with "
            f"{COLUMNS - 1} distances."
        ) from error
    return {**record, **ends, "lpips_sequence": sequence}
