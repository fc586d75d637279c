"""The one file that says what to train, read strictly: everything wrong in it is reported at once, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from .strict_config import Section, from_here, listed, read_strictly

Method = Literal["stlora", "gstlora", "projector"]

PAPERS: dict[str, dict[str, dict[str, Any]]] = {
    "stlora": {
        "adapter": {"rank": 16},
        "objective": {"kind": "pps", "guidance": 3.5},
        "optimiser": {"learning_rate": 5e-5},
        "run": {"steps": 1000, "batch": 6, "resolution": 1024},
    },
    "gstlora": {
        "adapter": {"rank": 16},
        "objective": {"kind": "spps", "guidance": 3.5},
        "optimiser": {"learning_rate": 5e-5},
        "run": {"steps": 1000, "batch": 6, "resolution": 1024},
    },
    "projector": {
        "adapter": {"rank": 4},
        "objective": {"kind": "flow", "guidance": 1.0},
        "optimiser": {"learning_rate": 2e-5},
        "run": {"steps": 110_000, "batch": 8, "resolution": 512},
        "samples": {"strengths": [0, 0.17, 0.33, 0.5, 0.67, 0.83, 1]},
    },
}
"""What SliderEdit and Kontinuous Kontext used; a config need not repeat it."""

_OBJECTIVES = {"stlora": ("pps", "spps"), "gstlora": ("spps",), "projector": ("flow",)}
_INSTRUCTIONS_KINDS = ("combinations", "pairs", "huggingface")


class Base(Section):
    """The model to train on, by file names in ComfyUI's model folders or by paths.

    comfyui: where it lies, if not around this pack. models: one more folder with diffusion_models, text_encoders, vae.
    encoder_options: for text encoders of unusual sizes. text_rows: to which the text is padded, as when it is used.
    """

    comfyui: Path | None = None
    models: Path | None = None
    model: str
    weight_dtype: Literal["default", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float32"] = "default"
    text_encoders: Annotated[list[str], Field(min_length=1, max_length=2)]
    encoder_options: dict[str, Any] = {}
    text_rows: Annotated[int, Field(ge=1)] = 512
    vae: str
    cpu: bool = False

    @field_validator("comfyui", "models")
    @classmethod
    def _resolve(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return None if value is None else from_here(value, info)

    @field_validator("model", "vae")
    @classmethod
    def _file_beside_the_config(cls, value: str, info: ValidationInfo) -> str:
        here = from_here(Path(value), info)
        return str(here) if here.is_file() else value

    @field_validator("text_encoders")
    @classmethod
    def _files_beside_the_config(cls, values: list[str], info: ValidationInfo) -> list[str]:
        return [cls._file_beside_the_config(value, info) for value in values]


class Combinations(Section):
    """A folder of pictures, and instructions that are combined at random."""

    kind: Literal["combinations"]
    images: Path
    instructions: Annotated[list[str], Field(min_length=1)] | Path
    never_together: list[Annotated[list[str], Field(min_length=2)]] = []
    most_in_a_prompt: Annotated[int, Field(ge=1, le=10)] = 3
    examples: Annotated[int, Field(ge=1)] = 1000
    held_out: Annotated[int, Field(ge=0)] = 2

    @field_validator("images", "instructions")
    @classmethod
    def _resolve(cls, value: Any, info: ValidationInfo) -> Any:
        return from_here(value, info) if isinstance(value, Path) else value


class Pairs(Section):
    """Pictures with their own instructions: JSON lines {"image": ..., "instructions": [...]}, or a folder of pictures
    each with a text file of the same name, one instruction per line."""

    kind: Literal["pairs"]
    path: Path
    most_in_a_prompt: Annotated[int, Field(ge=1, le=10)] = 3
    held_out: Annotated[int, Field(ge=0)] = 2

    _resolve = field_validator("path")(from_here)


class HuggingFace(Section):
    """A dataset of the Hugging Face hub, or one on disk, with a picture and an instruction per row (as HQ-Edit)."""

    kind: Literal["huggingface"]
    dataset: str
    split: str = "train"
    image_column: str = "input_image"
    instruction_column: str = "edit"
    most_in_a_prompt: Annotated[int, Field(ge=1, le=10)] = 3
    examples: Annotated[int, Field(ge=1)] = 8000
    held_out: Annotated[int, Field(ge=0)] = 2


class Stacks(Section):
    """Kontinuous Kontext's layout: horizontal stacks of pictures with a JSON record beside each."""

    kind: Literal["stacks"]
    path: Path
    most_kl: Annotated[float, Field(ge=0)] = 0.15
    category_thresholds: bool = True
    held_out: Annotated[int, Field(ge=0)] = 2

    _resolve = field_validator("path")(from_here)


Data = Annotated[Combinations | Pairs | HuggingFace | Stacks, Field(discriminator="kind")]


class Adapter(Section):
    rank: Annotated[int, Field(ge=1, le=1024)]


class Objective(Section):
    """What is learned. Timesteps: 'uniform', or 'logit_normal' around the middle."""

    kind: Literal["pps", "spps", "flow"]
    guidance: Annotated[float, Field(ge=0, le=100)]
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    timestep_mean: float = 0.0
    timestep_spread: Annotated[float, Field(gt=0)] = 1.0
    loss: Literal["mse", "huber"] = "mse"
    strength_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1


Share = Annotated[float, Field(ge=0, lt=1)]


class Optimiser(Section):
    kind: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Run(Section):
    """batch: samples per step, over all processes. micro_batch: of them at once on a device."""

    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)]
    micro_batch: Annotated[int, Field(ge=1)] = 1
    resolution: Annotated[int, Field(ge=16, multiple_of=16)]
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0
    checkpointing: bool = True


class Samples(Section):
    """Pictures of the held-out examples at several strengths while training."""

    every: Annotated[int, Field(ge=0)] = 100
    steps: Annotated[int, Field(ge=1)] = 20
    strengths: Annotated[list[float], Field(min_length=2)] = [-0.5, 0.0, 0.5, 1.0, 1.5]
    seed: Annotated[int, Field(ge=0)] = 0


class Checkpoints(Section):
    every: Annotated[int, Field(ge=1)] = 100
    keep: Annotated[int, Field(ge=1)] = 3


class Watching(Section):
    tensorboard: bool = True
    wandb: str | None = None


class Config(Section):
    """A training run. Sections that are left out have the papers' values for the method."""

    method: Method
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    output: Path
    cache: Path | None = None
    base: Base
    data: Data
    adapter: Adapter
    objective: Objective
    optimiser: Optimiser
    run: Run
    samples: Samples = Samples()
    checkpoints: Checkpoints = Checkpoints()
    watching: Watching = Watching()

    @field_validator("output", "cache")
    @classmethod
    def _resolve(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return None if value is None else from_here(value, info)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        kinds = ("stacks",) if self.method == "projector" else _INSTRUCTIONS_KINDS
        problems = [
            f"{name} is {found!r}; for {self.method} it is {listed(allowed)}"
            for name, found, allowed in (
                ("objective.kind", self.objective.kind, _OBJECTIVES[self.method]),
                ("data.kind", self.data.kind, kinds),
            )
            if found not in allowed
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.output / "cache"


def read_config(path: Path) -> Config:
    """Read a config. Raises TrainingError with everything that is wrong in it, each with its line."""
    return read_strictly(path, Config, _with_papers_values)


def _with_papers_values(content: dict[str, Any]) -> None:
    rate_given = isinstance(content.get("optimiser"), dict) and "learning_rate" in content["optimiser"]
    for section, values in PAPERS.get(str(content.get("method")), {}).items():
        given = content.get(section)
        if given is None or isinstance(given, dict):
            content[section] = {**values, **(given or {})}
    if isinstance(chosen := content.get("optimiser"), dict) and chosen.get("kind") == "prodigy" and not rate_given:
        chosen["learning_rate"] = 1.0  # it finds its own, times this
