"""The config of 'python -m training prepare': which pictures to edit how, and on which servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo, field_validator, model_validator

from ..edit_strips import MOST_KL
from ..strict_config import Section, from_here, read_strictly


def _address(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("expected the address of a ComfyUI, such as http://127.0.0.1:8188")
    return url.rstrip("/")


Server = Annotated[str, AfterValidator(_address)]
Instruction = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Folder(Section):
    """Every picture of a folder with every instruction: a list, a file with one per line, or category -> list."""

    kind: Literal["folder"]
    images: Path
    instructions: Path | list[Instruction] | dict[str, list[Instruction]]
    category: str = ""

    @field_validator("images", "instructions")
    @classmethod
    def _resolve(cls, value: Any, info: ValidationInfo) -> Any:
        return from_here(value, info) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _one_category(self) -> Folder:
        if self.category and isinstance(self.instructions, dict):
            raise ValueError("the instructions are given by category, so leave out the key category")
        return self


class Lines(Section):
    """JSON lines {"image": "file.png", "instruction": "...", "category": "..."}; category may be left out."""

    kind: Literal["jsonl"]
    path: Path

    _resolve = field_validator("path")(from_here)


class _BuiltIn(Section):
    """Models by their names in the servers' folders, and how to sample."""

    model: str
    weight_dtype: str = "default"
    text_encoders: Annotated[list[str], Field(min_length=2, max_length=2)]
    vae: str
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance: Annotated[Number, Field(ge=0, le=100)] = 2.5
    sampler: str = "euler"
    scheduler: str = "simple"


class Latents(_BuiltIn):
    """In between: latents of source and edit interpolated, noise added, denoised with an interpolated text.

    renoise: part of the schedule that is run again. neutral: the text of strength 0.
    """

    kind: Literal["latents"]
    renoise: Annotated[Number, Field(gt=0, le=1)] = 0.3
    neutral: str = "keep the image the same"


class Sliders(_BuiltIn):
    """In between: the instruction at a strength, by an adapter of this pack; the servers need the pack."""

    kind: Literal["sliders"]
    adapter: str
    adapter_kind: Literal["stlora", "gstlora"]


class Graphs(Section):
    """Own graphs, exported from ComfyUI in API format.

    edit: makes the full edit. strengths: makes the edit at "{strength}".
    """

    kind: Literal["graphs"]
    edit: Path
    strengths: Path

    _resolve = field_validator("edit", "strengths")(from_here)


class Filter(Section):
    """By what the report counts; as in the section data of a training config."""

    most_kl: Annotated[Number, Field(ge=0)] = MOST_KL
    category_thresholds: bool = True


class PrepareConfig(Section):
    """What to prepare. output: gets stacks/, report.json and report.png.

    resolution: of the renderings; stack_resolution: of the pictures in a stack. Both: side of a square of equal area.
    """

    output: Path
    servers: Annotated[list[Server], Field(min_length=1)]
    data: Annotated[Folder | Lines, Field(discriminator="kind")]
    render: Annotated[Latents | Sliders | Graphs, Field(discriminator="kind")]
    resolution: Annotated[int, Field(ge=16, multiple_of=16)] = 1024
    stack_resolution: Annotated[int, Field(ge=16, multiple_of=16)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    distance: Literal["lpips", "pixels"] = "lpips"
    filter: Filter = Filter()

    _resolve = field_validator("output")(from_here)

    @field_validator("servers")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))


def read_prepare_config(path: Path) -> PrepareConfig:
    """Read the config. Raises TrainingError with everything that is wrong in it, each with its line."""
    return read_strictly(path, PrepareConfig)
