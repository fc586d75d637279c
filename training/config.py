"""The config of a training run. configs/stlora.yaml documents all settings except those of the projector, which
configs/projector.yaml documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from .strict_config import Section, quoted_alternatives, read_config_file, resolve_path

Method = Literal["stlora", "gstlora", "projector"]

PAPER_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "stlora": {
        "adapter": {"rank": 16},
        "objective": {"type": "pps", "guidance": 3.5},
        "optimizer": {"learning_rate": 5e-5},
        "run": {"steps": 1000, "batch_size": 6, "resolution": 1024},
    },
    "gstlora": {
        "adapter": {"rank": 16},
        "objective": {"type": "spps", "guidance": 3.5},
        "optimizer": {"learning_rate": 5e-5},
        "run": {"steps": 1000, "batch_size": 6, "resolution": 1024},
    },
    "projector": {
        "adapter": {"rank": 4},
        "objective": {"type": "flow", "guidance": 1.0},
        "optimizer": {"learning_rate": 2e-5},
        "run": {"steps": 110_000, "batch_size": 8, "resolution": 512},
        "validation": {"strengths": [0, 0.17, 0.33, 0.5, 0.67, 0.83, 1]},
    },
}
"""Defaults per method, as in SliderEdit and Kontinuous Kontext."""

_OBJECTIVES = {"stlora": ("pps", "spps"), "gstlora": ("spps",), "projector": ("flow",)}
_INSTRUCTION_DATA = ("combinations", "pairs", "huggingface")

Fraction = Annotated[float, Field(ge=0, lt=1)]
NumValidation = Annotated[int, Field(ge=0)]
MaxInstructions = Annotated[int, Field(ge=1, le=10)]


class ModelConfig(Section):
    """The frozen model: file names in ComfyUI's model folders, or paths.

    comfyui: ComfyUI's folder, if the pack is not installed in it. extra_models_folder: another models folder, with
    diffusion_models, text_encoders and so on. text_encoder_options: only for text encoders of unusual sizes.
    max_sequence_length: number of text tokens that prompts are padded to.
    """

    comfyui: Path | None = None
    extra_models_folder: Path | None = None
    diffusion_model: str
    weight_dtype: Literal["default", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float32"] = "default"
    text_encoders: Annotated[list[str], Field(min_length=1, max_length=2)]
    text_encoder_options: dict[str, Any] = {}
    max_sequence_length: Annotated[int, Field(ge=1)] = 512
    vae: str
    cpu: bool = False

    @field_validator("comfyui", "extra_models_folder")
    @classmethod
    def _resolve(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return None if value is None else resolve_path(value, info)

    @field_validator("diffusion_model", "vae")
    @classmethod
    def _resolve_file(cls, value: str, info: ValidationInfo) -> str:
        """The path of a file next to the config; other names are left to ComfyUI's model folders."""
        file = resolve_path(Path(value), info)
        return str(file) if file.is_file() else value

    @field_validator("text_encoders")
    @classmethod
    def _resolve_files(cls, values: list[str], info: ValidationInfo) -> list[str]:
        return [cls._resolve_file(value, info) for value in values]


class CombinationsConfig(Section):
    """A folder of images and a list of instructions, combined at random."""

    type: Literal["combinations"]
    images: Path
    instructions: Annotated[list[str], Field(min_length=1)] | Path
    mutually_exclusive: list[Annotated[list[str], Field(min_length=2)]] = []
    max_instructions_per_prompt: MaxInstructions = 3
    num_examples: Annotated[int, Field(ge=1)] = 1000
    num_validation: NumValidation = 2

    @field_validator("images", "instructions")
    @classmethod
    def _resolve(cls, value: Any, info: ValidationInfo) -> Any:
        return resolve_path(value, info) if isinstance(value, Path) else value


class PairsConfig(Section):
    """Images with their own instructions: a file of JSON lines {"image": ..., "instructions": [...]}, or a folder in
    which each image has a text file of the same name with one instruction per line."""

    type: Literal["pairs"]
    path: Path
    max_instructions_per_prompt: MaxInstructions = 3
    num_validation: NumValidation = 2

    _resolve = field_validator("path")(resolve_path)


class HuggingFaceConfig(Section):
    """A dataset of the Hugging Face hub or on disk with an image and an instruction column, such as HQ-Edit."""

    type: Literal["huggingface"]
    dataset: str
    split: str = "train"
    image_column: str = "input_image"
    instruction_column: str = "edit"
    max_instructions_per_prompt: MaxInstructions = 3
    num_examples: Annotated[int, Field(ge=1)] = 8000
    num_validation: NumValidation = 2


class EditStripsConfig(Section):
    """A folder of edit strips in the layout of Kontinuous Kontext; see edit_strips.py."""

    type: Literal["edit_strips"]
    path: Path
    max_kl: Annotated[float, Field(ge=0)] = 0.15
    category_thresholds: bool = True
    num_validation: NumValidation = 2

    _resolve = field_validator("path")(resolve_path)


DataConfig = Annotated[
    CombinationsConfig | PairsConfig | HuggingFaceConfig | EditStripsConfig, Field(discriminator="type")
]


class AdapterConfig(Section):
    rank: Annotated[int, Field(ge=1, le=1024)]


class ObjectiveConfig(Section):
    """The loss. timestep_sampling: distribution of sigma, uniform or sigmoid(N(logit_mean, logit_std))."""

    type: Literal["pps", "spps", "flow"]
    guidance: Annotated[float, Field(ge=0, le=100)]
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    loss: Literal["mse", "huber"] = "mse"
    strength_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1


class OptimizerConfig(Section):
    type: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Fraction = 0.0


class RunConfig(Section):
    """batch_size: samples per step over all processes. micro_batch_size: samples per forward pass on one device."""

    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    resolution: Annotated[int, Field(ge=16, multiple_of=16)]
    seed: Annotated[int, Field(ge=0, lt=2**43)] = 0
    gradient_checkpointing: bool = True


class ValidationConfig(Section):
    """Rendering of the validation examples at several strengths. every_n_steps: 0 = never during training."""

    every_n_steps: Annotated[int, Field(ge=0)] = 100
    steps: Annotated[int, Field(ge=1)] = 20
    strengths: Annotated[list[float], Field(min_length=2)] = [-0.5, 0.0, 0.5, 1.0, 1.5]
    seed: Annotated[int, Field(ge=0)] = 0


class CheckpointConfig(Section):
    every_n_steps: Annotated[int, Field(ge=1)] = 100
    keep_last: Annotated[int, Field(ge=1)] = 3


class LoggingConfig(Section):
    tensorboard: bool = True
    wandb: str | None = None


class TrainingConfig(Section):
    """A training run. What a config leaves out has the default of its method in PAPER_DEFAULTS."""

    method: Method
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    output: Path
    cache: Path | None = None
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    run: RunConfig
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @field_validator("output", "cache")
    @classmethod
    def _resolve(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return None if value is None else resolve_path(value, info)

    @model_validator(mode="after")
    def _check_method(self) -> TrainingConfig:
        data_types = ("edit_strips",) if self.method == "projector" else _INSTRUCTION_DATA
        problems = [
            f"{key} is {value!r}; method {self.method} needs {quoted_alternatives(allowed)}"
            for key, value, allowed in (
                ("objective.type", self.objective.type, _OBJECTIVES[self.method]),
                ("data.type", self.data.type, data_types),
            )
            if value not in allowed
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.output / "cache"


def read_config(path: Path) -> TrainingConfig:
    """Read the config of a training run. Raises TrainingError with one line per error, each with its line number."""
    return read_config_file(path, TrainingConfig, _add_paper_defaults)


def _add_paper_defaults(content: dict[str, Any]) -> None:
    learning_rate_given = isinstance(content.get("optimizer"), dict) and "learning_rate" in content["optimizer"]
    for section, defaults in PAPER_DEFAULTS.get(str(content.get("method")), {}).items():
        given = content.get(section)
        if given is None or isinstance(given, dict):
            content[section] = {**defaults, **(given or {})}
    optimizer = content.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("type") == "prodigy" and not learning_rate_given:
        optimizer["learning_rate"] = 1.0  # Prodigy estimates the learning rate and multiplies it by this
