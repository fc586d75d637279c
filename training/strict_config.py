"""Strict reading of YAML config files: all errors are reported at once, each with its line number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo

from .errors import TrainingError

RENAMED_KEYS = {
    "base": "model",
    "model.model": "diffusion_model",
    "model.models": "extra_models_folder",
    "model.encoder_options": "text_encoder_options",
    "model.text_rows": "max_sequence_length",
    "data.kind": "type",
    "data.held_out": "num_validation",
    "data.examples": "num_examples",
    "data.never_together": "mutually_exclusive",
    "data.most_in_a_prompt": "max_instructions_per_prompt",
    "data.most_kl": "max_kl",
    "objective.kind": "type",
    "objective.timesteps": "timestep_sampling",
    "objective.timestep_mean": "logit_mean",
    "objective.timestep_spread": "logit_std",
    "optimiser": "optimizer",
    "optimizer.kind": "type",
    "optimizer.schedule": "lr_scheduler",
    "optimizer.clip_norm": "max_grad_norm",
    "optimizer.ema": "ema_decay",
    "run.batch": "batch_size",
    "run.micro_batch": "micro_batch_size",
    "run.checkpointing": "gradient_checkpointing",
    "samples": "validation",
    "validation.every": "every_n_steps",
    "checkpoints.every": "every_n_steps",
    "checkpoints.keep": "keep_last",
    "watching": "logging",
    "render.kind": "type",
    "render.renoise": "denoise",
    "render.neutral": "neutral_prompt",
    "render.adapter_kind": "adapter_type",
    "stack_resolution": "strip_resolution",
    "filter.most_kl": "max_kl",
}
"""Keys of earlier configs. Path, with the section's current name -> current name of the key."""

RENAMED_VALUES = {("data.type", "stacks"): "edit_strips"}
"""(current path of the key, earlier value) -> current value."""


class Section(BaseModel):
    """A section of a config. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Config = TypeVar("Config", bound=Section)


def resolve_path(value: Path, info: ValidationInfo) -> Path:
    """The absolute path; a relative one is relative to the folder of the config."""
    folder = (info.context or {}).get("folder", Path())
    return (folder / value.expanduser()).resolve()


def read_config_file(
    path: Path, section: type[Config], add_defaults: Callable[[dict[str, Any]], None] | None = None
) -> Config:
    """Read and validate a YAML file. add_defaults: fills in missing keys before validation, in place.

    Raises TrainingError with one line per error: file, line number, key, what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"The config {path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    try:
        tree, content = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TrainingError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        first = next(iter(section.model_fields))
        raise TrainingError(
            f"{path.name} contains a single {type(content).__name__}; expected keys such as '{first}: ...'."
        )
    if renamed := list(_renamed(tree)):
        raise TrainingError("\n".join(f"{path.name}, line {line}: {message}" for line, message in renamed))
    if add_defaults:
        add_defaults(content)
    try:
        return section.model_validate(content, context={"folder": path.resolve().parent})
    except ValidationError as error:
        problems = sorted({_problem(path, section, tree, one) for one in error.errors()})
        raise TrainingError("\n".join(text for _, text in problems)) from error


def current_path(path: Sequence[str]) -> tuple[str, ...]:
    """The current path of a key of an earlier config: ('optimiser', 'ema') -> ('optimizer', 'ema_decay')."""
    current: tuple[str, ...] = ()
    for key in path:
        current = (*current, RENAMED_KEYS.get(".".join((*current, key)), key))
    return current


def quoted_alternatives(values: Sequence[str]) -> str:
    return " or ".join(map(repr, values))


def _renamed(node: yaml.Node | None, parents: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """Line and message for each key or value that has a new name."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            continue
        path = (*parents, key.value)
        current = current_path(path)
        if current[-1] != key.value:
            yield key.start_mark.line + 1, f"'{'.'.join(path)}' is now '{'.'.join(current)}'"
        if isinstance(value, yaml.ScalarNode) and (new := RENAMED_VALUES.get((".".join(current), value.value))):
            yield value.start_mark.line + 1, f"the value '{value.value}' of '{'.'.join(current)}' is now '{new}'"
        yield from _renamed(value, path)


def _problem(path: Path, section: type[Section], tree: yaml.Node | None, error: Any) -> tuple[int, str]:
    """Line number and message of a pydantic error."""
    line, has_value, keys = _locate(tree, error["loc"], error["type"] == "missing")
    location = ".".join(map(str, keys)) or "config"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key; expected one of {', '.join(sorted(_allowed_keys(section, error['loc'][:-1])))}"
    value = f", found {error['input']!r}" if has_value and isinstance(error["input"], (str, int, float)) else ""
    return line, f"{path.name}, line {line}: {location}: {message}{value}"


def _locate(node: yaml.Node | None, loc: Sequence[Any], missing: bool) -> tuple[int, bool, list[Any]]:
    """Find pydantic's error location in the file: line number, whether the value is in the file, path of keys.

    For a missing key the line is that of its section. Pydantic also puts the tags of unions into `loc`; they are not
    keys of the file and are left out of the path.
    """
    line, keys = 1, []
    for k, key in enumerate(loc):
        if isinstance(node, yaml.MappingNode):
            pair = next(((name, value) for name, value in node.value if name.value == str(key)), None)
            if pair:
                line, node = pair[0].start_mark.line + 1, pair[1]
                keys.append(key)
            elif missing and k == len(loc) - 1:
                return line, False, [*keys, key]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
            keys.append(key)
    return line, True, keys


def _allowed_keys(section: type[BaseModel], loc: Sequence[Any]) -> set[str]:
    """The valid keys at pydantic's location `loc`."""
    sections = [section]
    for key in loc:
        if tagged := [one for one in sections if _has_type(one, key)]:
            sections = tagged
        elif fields := [one.model_fields[key] for one in sections if key in one.model_fields]:
            sections = [inner for field in fields for inner in _sections_in(field.annotation)]
    return {name for one in sections for name in one.model_fields}


def _has_type(section: type[BaseModel], tag: object) -> bool:
    field = section.model_fields.get("type")
    return field is not None and tag in get_args(field.annotation)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
