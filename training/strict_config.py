"""Config files read strictly: everything wrong in one is reported at once, each with its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo

from .errors import TrainingError


class Section(BaseModel):
    """A part of a config; keys that it does not have are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Read = TypeVar("Read", bound=Section)


def from_here(value: Path, info: ValidationInfo) -> Path:
    """Relative paths count from the config's folder."""
    folder = (info.context or {}).get("folder", Path())
    return (folder / value.expanduser()).resolve()


def read_strictly(path: Path, section: type[Read], complete: Callable[[dict[str, Any]], None] | None = None) -> Read:
    """Read a YAML file as a section. Raises TrainingError with everything that is wrong in it, each with its line.

    complete: fills in what may be left out.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"The config {path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    try:
        tree, content = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TrainingError(f"{path.name} is no YAML: {error}") from error
    if not isinstance(content, dict):
        first = next(iter(section.model_fields))
        raise TrainingError(f"{path.name} holds {type(content).__name__}; expected keys such as '{first}: ...'.")
    if complete:
        complete(content)
    try:
        return section.model_validate(content, context={"folder": path.resolve().parent})
    except ValidationError as error:
        problems = sorted({_problem(path, section, tree, one) for one in error.errors()})
        raise TrainingError("\n".join(text for _, text in problems)) from error


def listed(values: Sequence[str]) -> str:
    return " or ".join(map(repr, values))


def _problem(path: Path, section: type[Section], tree: yaml.Node | None, error: Any) -> tuple[int, str]:
    """Line and message of one thing that is wrong."""
    line, known, places = _found(tree, error["loc"], error["type"] == "missing")
    where = ".".join(map(str, places)) or "the whole"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_allowed(section, error["loc"][:-1])))
        said = f"there is no such key here; there are {allowed}"
    found = f", found {error['input']!r}" if known and isinstance(error["input"], (str, int, float)) else ""
    return line, f"{path.name}, line {line}: {where}: {said}{found}"


def _found(node: yaml.Node | None, loc: Sequence[Any], missing: bool) -> tuple[int, bool, list[Any]]:
    """The line of a value, else of what it should be in; whether the value itself is there; its place in the file.

    Of a location, names of the alternatives that were tried are left out: they stand nowhere in the file.
    """
    line, places = 1, []
    for k, place in enumerate(loc):
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(place)), None)
            if pair:
                line, node = pair[0].start_mark.line + 1, pair[1]
                places.append(place)
            elif missing and k == len(loc) - 1:
                return line, False, [*places, place]
        elif isinstance(node, yaml.SequenceNode) and isinstance(place, int) and place < len(node.value):
            node = node.value[place]
            line = node.start_mark.line + 1
            places.append(place)
    return line, True, places


def _allowed(section: type[BaseModel], loc: Sequence[Any]) -> set[str]:
    """The keys that may stand at a location."""
    sections = [section]
    for place in loc:
        if alternative := [one for one in sections if _is_kind(one, place)]:
            sections = alternative
        elif fields := [one.model_fields[place] for one in sections if place in one.model_fields]:
            sections = [inner for field in fields for inner in _sections_in(field.annotation)]
    return {name for one in sections for name in one.model_fields}


def _is_kind(section: type[BaseModel], tag: object) -> bool:
    field = section.model_fields.get("kind")
    return field is not None and tag in get_args(field.annotation)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
