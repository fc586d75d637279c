"""The edits that a config asks for: which picture, which instruction."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import TrainingError
from ..examples import lines_of, pictures_in
from .config import Folder, Lines

_EXPECTED = '{"image": "file.png", "instruction": "make ...", "category": "stylization"}; category may be left out'


class Edit(NamedTuple):
    """name: of its files, made of picture and instruction; the same on every run."""

    name: str
    image: Path
    instruction: str
    category: str


def read_edits(data: Folder | Lines) -> list[Edit]:
    """All edits, each once. Raises TrainingError when there are none, or with every line that is none."""
    found = _of_folder(data) if isinstance(data, Folder) else _of_lines(data.path)
    edits = list({edit.name: edit for edit in found}.values())
    if not edits:
        raise TrainingError("The config's section data names no instruction; give at least one.")
    return edits


def _of_folder(data: Folder) -> Iterator[Edit]:
    given = data.instructions
    listed = lines_of(given) if isinstance(given, Path) else given
    by_category = listed if isinstance(listed, dict) else {data.category: listed}
    for image in pictures_in(data.images):
        for category, instructions in by_category.items():
            for instruction in instructions:
                yield _edit(data.images, image, instruction, category)


def _of_lines(path: Path) -> Iterator[Edit]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read as text: {error}.") from error
    edits, wrong = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = (record["image"], record["instruction"], record.get("category", ""))
            if not all(isinstance(text, str) for text in texts) or not texts[1].strip():
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong.append(f"line {number}")
            continue
        edits.append(_edit(path.parent, path.parent / texts[0], *texts[1:]))
    if wrong:
        raise TrainingError(f"{path.name}, {', '.join(wrong)}: expected {_EXPECTED}.")
    yield from edits


def _edit(folder: Path, image: Path, instruction: str, category: str) -> Edit:
    instruction = " ".join(instruction.split())
    place = image.relative_to(folder).as_posix() if image.is_relative_to(folder) else image.as_posix()
    digest = hashlib.sha256(f"{place}\n{instruction}".encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w-]+", "_", image.stem)[:60]
    return Edit(f"{stem}_{digest}", image, instruction, category)
