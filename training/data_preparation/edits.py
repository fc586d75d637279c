"""The edits that a config asks for: pairs of an image and an instruction."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import TrainingError
from ..examples import list_images, read_lines
from .config import FolderConfig, JsonLinesConfig

_EXPECTED = '{"image": "file.png", "instruction": "make ...", "category": "stylization"}; category is optional'


class Edit(NamedTuple):
    """name: of the edit's files; derived from image and instruction, so it is the same in every run."""

    name: str
    image: Path
    instruction: str
    category: str


def read_edits(data: FolderConfig | JsonLinesConfig) -> list[Edit]:
    """All edits without duplicates. Raises TrainingError when there are none, or with all invalid lines."""
    edits = _from_folder(data) if isinstance(data, FolderConfig) else _from_json_lines(data.path)
    unique = list({edit.name: edit for edit in edits}.values())
    if not unique:
        raise TrainingError("The section data contains no instruction; add at least one.")
    return unique


def _from_folder(data: FolderConfig) -> Iterator[Edit]:
    given = read_lines(data.instructions) if isinstance(data.instructions, Path) else data.instructions
    by_category = given if isinstance(given, dict) else {data.category: given}
    for image in list_images(data.images):
        for category, instructions in by_category.items():
            for instruction in instructions:
                yield _edit(data.images, image, instruction, category)


def _from_json_lines(path: Path) -> Iterator[Edit]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read as text: {error}.") from error
    edits, invalid = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = (record["image"], record["instruction"], record.get("category", ""))
            if not all(isinstance(text, str) for text in texts) or not texts[1].strip():
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            invalid.append(f"line {number}")
            continue
        edits.append(_edit(path.parent, path.parent / texts[0], *texts[1:]))
    if invalid:
        raise TrainingError(f"{path.name}, {', '.join(invalid)}: expected {_EXPECTED}.")
    yield from edits


def _edit(folder: Path, image: Path, instruction: str, category: str) -> Edit:
    instruction = " ".join(instruction.split())
    relative = image.relative_to(folder).as_posix() if image.is_relative_to(folder) else image.as_posix()
    digest = hashlib.sha256(f"{relative}\n{instruction}".encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w-]+", "_", image.stem)[:60]
    return Edit(f"{stem}_{digest}", image, instruction, category)
