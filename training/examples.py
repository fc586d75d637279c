"""Training examples: images with instructions, or with edited images at several strengths."""

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

from .config import CombinationsConfig, DataConfig, EditStripsConfig, HuggingFaceConfig, PairsConfig, TrainingConfig
from .edit_strips import read_edit_strips
from .errors import TrainingError
from .rng import generator

_LOG = logging.getLogger(__name__)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageFile(NamedTuple):
    """An image file, or one of `num_columns` equal columns of it."""

    file: Path
    column: int = 0
    num_columns: int = 1

    def open(self) -> Image.Image:
        """The image in RGB, with its EXIF orientation applied. Raises OSError when the file is damaged."""
        with Image.open(self.file) as content:
            image = ImageOps.exif_transpose(content).convert("RGB")
        width = image.width // self.num_columns
        return image.crop((self.column * width, 0, (self.column + 1) * width, image.height))


class Target(NamedTuple):
    """The edited image at a strength."""

    image: ImageFile
    strength: float


class Example(NamedTuple):
    """An image and its instructions; targets: for the projector, the edited image at several strengths."""

    source: ImageFile
    instructions: tuple[str, ...]
    targets: tuple[Target, ...] = ()


class Examples(NamedTuple):
    training: list[Example]
    validation: list[Example]


def read_examples(config: TrainingConfig) -> Examples:
    """Read all examples and split off the validation examples. Raises TrainingError when no training example is left.

    Training examples with the same image and instructions as a validation example are dropped.
    """
    data, seed = config.data, config.run.seed
    examples = list(_read(data, seed, config.cache_folder))
    if len(examples) <= data.num_validation:
        raise TrainingError(
            f"There are {len(examples)} examples and data.num_validation is {data.num_validation}: none are left for "
            "training. Add images, or lower data.num_validation."
        )
    order = torch.randperm(len(examples), generator=generator(seed, "held out")).tolist()
    validation = [examples[k] for k in sorted(order[: data.num_validation])]
    excluded = {(example.source, frozenset(example.instructions)) for example in validation}
    training = [example for example in examples if (example.source, frozenset(example.instructions)) not in excluded]
    if not training:
        raise TrainingError(
            "Every training example has the same image and instructions as a validation example. Add instructions, or "
            "set data.num_validation to 0."
        )
    if config.objective.type == "pps" and all(len(example.instructions) == 1 for example in training):
        _LOG.warning("Every prompt has only one instruction, so the adapter cannot learn to tell instructions apart.")
    return Examples(training, validation)


def _read(data: DataConfig, seed: int, cache: Path) -> Iterator[Example]:
    if isinstance(data, CombinationsConfig):
        return _combinations(data, seed)
    if isinstance(data, PairsConfig):
        return _pairs(data)
    if isinstance(data, HuggingFaceConfig):
        return _hub_dataset(data, cache)
    return _edit_strips(data)


def list_images(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted. Raises TrainingError when there are none."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    if not files:
        raise TrainingError(
            f"{folder} contains no images; expected a folder with {', '.join(sorted(IMAGE_SUFFIXES))} files."
        )
    return files


def _combinations(data: CombinationsConfig, seed: int) -> Iterator[Example]:
    """Each image equally often, with 1 to max_instructions_per_prompt random compatible instructions."""
    images = list_images(data.images)
    given = read_lines(data.instructions) if isinstance(data.instructions, Path) else data.instructions
    instructions = list(map(_single_line, given))
    exclusive = [set(map(_single_line, group)) for group in data.mutually_exclusive]
    if unknown := set(chain(*exclusive)) - set(instructions):
        raise TrainingError(
            f"data.mutually_exclusive contains {sorted(unknown)[0]!r}, which is not one of data.instructions."
        )
    order = torch.randperm(len(images), generator=generator(seed, "pictures")).tolist()
    for k in range(data.num_examples):
        rng = generator(seed, "combination", k)
        count = int(torch.randint(1, data.max_instructions_per_prompt + 1, (), generator=rng))
        chosen: list[str] = []
        for index in torch.randperm(len(instructions), generator=rng).tolist():
            one = instructions[index]
            if len(chosen) < count and not any(one in group and group & set(chosen) for group in exclusive):
                chosen.append(one)
        yield Example(ImageFile(images[order[k % len(images)]]), tuple(chosen))


def _pairs(data: PairsConfig) -> Iterator[Example]:
    records = _json_lines(data.path) if data.path.is_file() else _text_files(data.path)
    for file, instructions in records:
        for first in range(0, len(instructions), data.max_instructions_per_prompt):
            yield Example(ImageFile(file), tuple(instructions[first : first + data.max_instructions_per_prompt]))


def _json_lines(path: Path) -> Iterator[tuple[Path, list[str]]]:
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
        yield path.parent / file, list(map(_single_line, instructions))


def _text_files(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    for file in list_images(folder):
        if file.with_suffix(".txt").is_file():
            yield file, read_lines(file.with_suffix(".txt"))


def _single_line(instruction: str) -> str:
    """The instruction without line breaks, which separate instructions when a prompt is encoded."""
    return " ".join(instruction.split())


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file. Raises TrainingError when there are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read as text: {error}.") from error
    if not any(lines):
        raise TrainingError(f"{path} is empty; expected one instruction per line.")
    return [line for line in lines if line]


def _hub_dataset(data: HuggingFaceConfig, cache: Path) -> Iterator[Example]:
    """The rows of a dataset. They are saved as files the first time; later runs do not access the hub."""
    query = (data.dataset, data.split, data.image_column, data.instruction_column, data.num_examples)
    folder = cache / "hub" / hashlib.sha256(repr(query).encode()).hexdigest()[:16]
    index = folder / "rows.json"
    if not index.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(index, json.dumps(_save_rows(data, folder)).encode())
    for name, instructions in json.loads(index.read_text(encoding="utf-8")):
        yield Example(ImageFile(folder / name), tuple(instructions))


def _save_rows(data: HuggingFaceConfig, folder: Path) -> list[tuple[str, list[str]]]:
    """Save the images of rows that have an image and an instruction. Returns (file name, instructions) per row."""
    saved: list[tuple[str, list[str]]] = []
    skipped = 0
    for number, row in enumerate(_rows(data)):
        if number == data.num_examples:
            break
        texts = row[data.instruction_column]
        texts = [texts] if isinstance(texts, str) else list(texts or ())
        instructions = [_single_line(text) for text in texts if isinstance(text, str) and text.strip()]
        if row[data.image_column] is None or not instructions:
            skipped += 1
            continue
        content = io.BytesIO()
        row[data.image_column].convert("RGB").save(content, "PNG")
        atomic_write(folder / f"{number:07}.png", content.getvalue())
        saved.append((f"{number:07}.png", instructions[: data.max_instructions_per_prompt]))
    if skipped:
        _LOG.warning("%d rows of %s have no image or no instruction and are skipped.", skipped, data.dataset)
    return saved


def _rows(data: HuggingFaceConfig) -> Iterator[Any]:
    """Stream the rows of a dataset. Raises TrainingError when it cannot be loaded."""
    try:
        import datasets
    except ImportError as error:
        raise TrainingError("data.type huggingface needs the package datasets: pip install datasets.") from error
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
            f"The dataset {data.dataset!r} cannot be loaded: {error}. Check its name and the connection to the hub, or "
            "set data.dataset to a folder with the dataset."
        ) from error


def _edit_strips(data: EditStripsConfig) -> Iterator[Example]:
    for strip in read_edit_strips(data.path, data.max_kl, data.category_thresholds):
        targets = (
            Target(ImageFile(strip.file, column, strip.num_columns), strength)
            for column, strength in strip.strengths.items()
        )
        yield Example(ImageFile(strip.file, 0, strip.num_columns), (strip.instruction,), tuple(targets))


def resize_to_area(image: Image.Image, resolution: int) -> Image.Image:
    """Resize to about resolution x resolution pixels, keeping the aspect ratio; sides become multiples of 16.

    What exceeds those sides is cropped around the center.
    """
    scale = resolution / (image.width * image.height) ** 0.5
    width, height = (max(round(side * scale / 16), 1) * 16 for side in image.size)
    factor = max(width / image.width, height / image.height)
    scaled = image.resize([round(side * factor) for side in image.size], Image.Resampling.LANCZOS)
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def pil_to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """A ComfyUI IMAGE: (n, height, width, 3), 0 to 1."""
    return torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images])) / 255


def tensor_to_pil(pixels: torch.Tensor) -> Image.Image:
    """The image of a tensor (height, width, 3), 0 to 1."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().cpu().numpy())
