"""What a run learns from: pictures with instructions, or pictures with their edits at several strengths."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from slider_core.atomic_write import atomic_write

from .config import Combinations, Config, Data, HuggingFace, Pairs, Stacks
from .edit_strips import read_stacks
from .errors import TrainingError
from .rng import generator

_LOG = logging.getLogger(__name__)
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Picture(NamedTuple):
    """A picture file, or the k-th of n equal columns of one."""

    file: Path
    column: int = 0
    columns: int = 1

    def open(self) -> Image.Image:
        """Its pixels, upright. Raises OSError when it is damaged."""
        with Image.open(self.file) as picture:
            whole = ImageOps.exif_transpose(picture).convert("RGB")
        width = whole.width // self.columns
        return whole.crop((self.column * width, 0, (self.column + 1) * width, whole.height))


class Target(NamedTuple):
    """What the edit looks like at a strength."""

    picture: Picture
    strength: float


class Example(NamedTuple):
    """A picture, what to do to it, and, for the projector, what comes of it."""

    source: Picture
    instructions: tuple[str, ...]
    targets: tuple[Target, ...] = ()


class Examples(NamedTuple):
    training: list[Example]
    held_out: list[Example]


def read_examples(config: Config) -> Examples:
    """All examples, those that are held out apart. Raises TrainingError when there is nothing to learn from."""
    data, seed = config.data, config.run.seed
    found = list(_examples(data, seed, config.cache_folder))
    if len(found) <= data.held_out:
        raise TrainingError(
            f"There are {len(found)} examples, and {data.held_out} of them are to be held out: nothing is left to "
            "learn from. Give more pictures, or set data.held_out to less."
        )
    order = torch.randperm(len(found), generator=generator(seed, "held out")).tolist()
    held_out = [found[k] for k in sorted(order[: data.held_out])]
    seen = {(example.source, frozenset(example.instructions)) for example in held_out}
    training = [example for example in found if (example.source, frozenset(example.instructions)) not in seen]
    if not training:
        raise TrainingError(
            "All examples are held out: every picture has the same instructions. Give more, or set data.held_out to 0."
        )
    if config.objective.kind == "pps" and all(len(example.instructions) == 1 for example in training):
        _LOG.warning("Every prompt has one instruction only, so the adapter cannot learn to tell them apart.")
    return Examples(training, held_out)


def _examples(data: Data, seed: int, cache: Path) -> Iterator[Example]:
    if isinstance(data, Combinations):
        return _combined(data, seed)
    if isinstance(data, Pairs):
        return _paired(data)
    if isinstance(data, HuggingFace):
        return _from_hub(data, cache)
    return _from_stacks(data)


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by name. Raises TrainingError when there are none."""
    found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not found:
        raise TrainingError(f"{folder} holds no pictures; expected a folder with {', '.join(sorted(PICTURES))} files.")
    return found


def _combined(data: Combinations, seed: int) -> Iterator[Example]:
    """Each picture equally often, each time with 1 to most_in_a_prompt instructions that may stand together."""
    images = pictures_in(data.images)
    given = lines_of(data.instructions) if isinstance(data.instructions, Path) else data.instructions
    instructions = list(map(_on_one_line, given))
    contrary = [set(map(_on_one_line, group)) for group in data.never_together]
    if unknown := set(chain(*contrary)) - set(instructions):
        raise TrainingError(f"data.never_together names {sorted(unknown)[0]!r}, which is not among the instructions.")
    order = torch.randperm(len(images), generator=generator(seed, "pictures")).tolist()
    for k in range(data.examples):
        chance = generator(seed, "combination", k)
        wanted = int(torch.randint(1, data.most_in_a_prompt + 1, (), generator=chance))
        chosen: list[str] = []
        for number in torch.randperm(len(instructions), generator=chance).tolist():
            one = instructions[number]
            if len(chosen) < wanted and not any(one in group and group & set(chosen) for group in contrary):
                chosen.append(one)
        yield Example(Picture(images[order[k % len(images)]]), tuple(chosen))


def _paired(data: Pairs) -> Iterator[Example]:
    records = _records(data.path) if data.path.is_file() else _add_branch(data.path)
    for file, instructions in records:
        for first in range(0, len(instructions), data.most_in_a_prompt):
            yield Example(Picture(file), tuple(instructions[first : first + data.most_in_a_prompt]))


def _records(path: Path) -> Iterator[tuple[Path, list[str]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            file, instructions = record["image"], record["instructions"]
            instructions = [instructions] if isinstance(instructions, str) else instructions
            if not (instructions and all(isinstance(one, str) and one.strip() for one in instructions)):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f'{path.name}, line {number}: expected {{"image": "file.png", "instructions": ["make ..."]}}.'
            ) from error
        yield path.parent / file, list(map(_on_one_line, instructions))


def _add_branch(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    for file in pictures_in(folder):
        if file.with_suffix(".txt").is_file():
            yield file, lines_of(file.with_suffix(".txt"))


def _on_one_line(instruction: str) -> str:
    """Sub-instructions are told apart by line breaks later on."""
    return " ".join(instruction.split())


def lines_of(path: Path) -> list[str]:
    """The lines of a text file. Raises TrainingError when it has none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read as text: {error}.") from error
    if not any(lines):
        raise TrainingError(f"{path} is empty; expected one instruction per line.")
    return [line for line in lines if line]


def _from_hub(data: HuggingFace, cache: Path) -> Iterator[Example]:
    """Rows of a dataset, kept as files the first time: later the hub is not asked again."""
    of = (data.dataset, data.split, data.image_column, data.instruction_column, data.examples)
    folder = cache / "hub" / hashlib.sha256(repr(of).encode()).hexdigest()[:16]
    index = folder / "rows.json"
    if not index.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(index, json.dumps(_kept_rows(data, folder)).encode())
    for name, told in json.loads(index.read_text(encoding="utf-8")):
        yield Example(Picture(folder / name), tuple(told))


def _kept_rows(data: HuggingFace, folder: Path) -> list[tuple[str, list[str]]]:
    """The rows that have a picture and instructions; their pictures are written into the folder."""
    kept: list[tuple[str, list[str]]] = []
    left_out = 0
    for number, row in enumerate(_rows(data)):
        if number == data.examples:
            break
        told = row[data.instruction_column]
        told = [told] if isinstance(told, str) else list(told or ())
        instructions = [_on_one_line(one) for one in told if isinstance(one, str) and one.strip()]
        if row[data.image_column] is None or not instructions:
            left_out += 1
            continue
        content = io.BytesIO()
        row[data.image_column].convert("RGB").save(content, "PNG")
        atomic_write(folder / f"{number:07}.png", content.getvalue())
        kept.append((f"{number:07}.png", instructions[: data.most_in_a_prompt]))
    if left_out:
        _LOG.warning("%d rows of %s have no picture or no instruction, and are left out.", left_out, data.dataset)
    return kept


def _rows(data: HuggingFace) -> Iterator[Any]:
    """Raises TrainingError when the dataset cannot be read."""
    try:
        import datasets
    except ImportError as error:
        raise TrainingError("data.kind huggingface needs the package 'datasets': pip install datasets.") from error
    try:
        for row in datasets.load_dataset(data.dataset, split=data.split, streaming=True):
            if not {data.image_column, data.instruction_column} <= set(row):
                raise TrainingError(
                    f"{data.dataset} has the columns {', '.join(row)}; expected {data.image_column!r} and "
                    f"{data.instruction_column!r}. Set data.image_column and data.instruction_column."
                )
            yield row
    except TrainingError:
        raise
    except Exception as error:
        raise TrainingError(
            f"The dataset {data.dataset!r} cannot be loaded: {error}. Is its name right, and the hub within reach? A "
            "folder that holds a dataset works too."
        ) from error


def _from_stacks(data: Stacks) -> Iterator[Example]:
    for stack in read_stacks(data.path, data.most_kl, data.category_thresholds):
        targets = (Target(Picture(stack.file, k, stack.columns), strength) for k, strength in stack.strengths.items())
        yield Example(Picture(stack.file, 0, stack.columns), (stack.instruction,), tuple(targets))


def resized(picture: Image.Image, resolution: int) -> Image.Image:
    """Of the area resolution x resolution and nearly its own shape: sides are multiples of 16, the middle is kept."""
    scale = resolution / (picture.width * picture.height) ** 0.5
    width, height = (max(round(side * scale / 16), 1) * 16 for side in picture.size)
    enlarge = max(width / picture.width, height / picture.height)
    whole = picture.resize([round(side * enlarge) for side in picture.size], Image.Resampling.LANCZOS)
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    return whole.crop((left, top, left + width, top + height))


def of_pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(n, height, width, 3), 0 to 1, as ComfyUI's images."""
    return torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in pictures])) / 255


def as_picture(pixels: torch.Tensor) -> Image.Image:
    """A picture of (height, width, 3), 0 to 1."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().cpu().numpy())
