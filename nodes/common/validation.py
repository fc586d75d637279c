"""Checks of strengths before a graph runs."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, Signature

from ...slider_core.errors import SliderError
from ...slider_core.strength import validate_strengths


def strength_validator(*names: str) -> classmethod:
    """`validate_inputs` for a node whose inputs `names` come from strength_input.

    ComfyUI leaves its own range check to validate_inputs for the inputs in that method's signature, and attributes the
    returned message to each of them (validate_inputs in ComfyUI's execution.py). So the signature lists exactly these.
    """

    def validate_inputs(cls: type, **strengths: object) -> bool | str:
        return _check(strengths)

    validate_inputs.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter("cls", Parameter.POSITIONAL_OR_KEYWORD),
            *(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names),
        ]
    )
    return classmethod(validate_inputs)


def _check(strengths: Mapping[str, object]) -> bool | str:
    """True, or the error message for the first invalid strength. None stands for a link, whose value is not known."""
    try:
        for name, value in strengths.items():
            if value is not None:
                validate_strengths(value, name)
    except SliderError as error:
        return str(error)
    return True
