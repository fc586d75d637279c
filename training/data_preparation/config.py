"""The config of 'python -m training prepare'. training/configs/prepare.yaml documents all settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo, field_validator, model_validator

from ..edit_strips import MAX_KL
from ..strict_config import Section, read_config_file, resolve_path


def _check_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("expected the address of a ComfyUI server, such as http://127.0.0.1:8188")
    return url.rstrip("/")


Server = Annotated[str, AfterValidator(_check_url)]
Instruction = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class FolderConfig(Section):
    """Every image of a folder with every instruction: a list, a file with one per line, or category -> list."""

    type: Literal["folder"]
    images: Path
    instructions: Path | list[Instruction] | dict[str, list[Instruction]]
    category: str = ""

    @field_validator("images", "instructions")
    @classmethod
    def _resolve(cls, value: Any, info: ValidationInfo) -> Any:
        return resolve_path(value, info) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _check_category(self) -> FolderConfig:
        if self.category and isinstance(self.instructions, dict):
            raise ValueError("the instructions are given by category; remove the key category")
        return self


class JsonLinesConfig(Section):
    """JSON lines {"image": "file.png", "instruction": "...", "category": "..."}; category is optional."""

    type: Literal["jsonl"]
    path: Path

    _resolve = field_validator("path")(resolve_path)


class _ModelRenderConfig(Section):
    """Models, by their names in the servers' model folders, and sampling settings."""

    model: str
    weight_dtype: str = "default"
    text_encoders: Annotated[list[str], Field(min_length=2, max_length=2)]
    vae: str
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance: Annotated[FiniteFloat, Field(ge=0, le=100)] = 2.5
    sampler: str = "euler"
    scheduler: str = "simple"


class LatentInterpolationConfig(_ModelRenderConfig):
    """Intermediate strengths by interpolating the latents of source and edit, and denoising them partly.

    denoise: KSampler's denoise. neutral_prompt: prompt at strength 0, interpolated with the instruction.
    """

    type: Literal["latents"]
    denoise: Annotated[FiniteFloat, Field(gt=0, le=1)] = 0.3
    neutral_prompt: str = "keep the image the same"


class SliderConfig(_ModelRenderConfig):
    """Intermediate strengths by an adapter of this pack, which must be installed on the servers."""

    type: Literal["sliders"]
    adapter: str
    adapter_type: Literal["stlora", "gstlora"]


class GraphConfig(Section):
    """Workflows of the user, exported from ComfyUI in API format.

    edit: renders the full edit. strengths: renders the edit at the strength "{strength}".
    """

    type: Literal["graphs"]
    edit: Path
    strengths: Path

    _resolve = field_validator("edit", "strengths")(resolve_path)


class FilterConfig(Section):
    """Filters of the report; same meaning as in the section data of a training config."""

    max_kl: Annotated[FiniteFloat, Field(ge=0)] = MAX_KL
    category_thresholds: bool = True


class PrepareConfig(Section):
    """output: gets edit_strips/, report.json and report.png.

    resolution: of the renderings; strip_resolution: of each column of a strip. Both: side of a square of equal area.
    """

    output: Path
    servers: Annotated[list[Server], Field(min_length=1)]
    data: Annotated[FolderConfig | JsonLinesConfig, Field(discriminator="type")]
    render: Annotated[LatentInterpolationConfig | SliderConfig | GraphConfig, Field(discriminator="type")]
    resolution: Annotated[int, Field(ge=16, multiple_of=16)] = 1024
    strip_resolution: Annotated[int, Field(ge=16, multiple_of=16)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    distance: Literal["lpips", "pixels"] = "lpips"
    filter: FilterConfig = FilterConfig()

    _resolve = field_validator("output")(resolve_path)

    @field_validator("servers")
    @classmethod
    def _remove_duplicates(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @property
    def strips_folder(self) -> Path:
        """edit_strips in the output, or stacks, where earlier versions wrote, if that exists."""
        former = self.output / "stacks"
        return former if former.is_dir() else self.output / "edit_strips"


def read_prepare_config(path: Path) -> PrepareConfig:
    """Read the config. Raises TrainingError with one line per error, each with its line number."""
    return read_config_file(path, PrepareConfig)
