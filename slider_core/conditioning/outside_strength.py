"""The strength that replaces a conditioning entry's own strengths outside a mask or a range of the schedule.

An entry carries both, ready-made; each model call uses one of them, so that no step gets both or neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfy.conds import CONDRegular

from .. import keys
from .. import node_names as names
from ..errors import SliderError
from ..patching.forward_patches import ForwardContext


class StrengthCarrier(ABC):
    """A value in the dict of a conditioning entry that carries strengths of its own.

    refusal: why the strengths cannot be limited to a mask or schedule range, as a message; None if they can.
    """

    refusal: str | None = None

    @abstractmethod
    def outside(self, options: Mapping[str, Any], strength: float) -> Mapping[str, CONDRegular]:
        """The model_conds that set all of its sliders to one strength, under the keys used outside.

        options: the dict of the entry.
        """


def carriers_of(options: Mapping[str, Any]) -> list[StrengthCarrier]:
    """Everything in the dict of a conditioning entry that carries strengths."""
    return [value for value in options.values() if isinstance(value, StrengthCarrier)]


@dataclass(frozen=True)
class OutsideStrength:
    """One strength for all sliders of a conditioning entry, wherever its own strengths do not apply.

    inside: (start, end) of the schedule where the entry's own strengths apply; None: nowhere.
    """

    strength: float
    inside: tuple[float, float] | None

    def applies(self, context: ForwardContext) -> bool:
        return self.inside is None or not context.within(*self.inside)


def current_outside_strength(context: ForwardContext) -> float | None:
    """The strength of all sliders in a model call outside their schedule range or mask; None inside."""
    outside = context.conds.get(keys.OUTSIDE_STRENGTH)
    return outside.strength if outside is not None and outside.applies(context) else None


def outside_strength_of(options: Mapping[str, Any]) -> OutsideStrength | None:
    """The OutsideStrength in the dict of a conditioning entry, if it has one."""
    cond = options.get("model_conds", {}).get(keys.OUTSIDE_STRENGTH)
    return None if cond is None else cond.cond


def require_before_mask_and_schedule(options: Mapping[str, Any], node: str) -> None:
    """Raise SliderError when the sliders of a conditioning entry have already been limited to a mask or range.

    node: display name of the node that wants to add sliders.
    """
    if outside_strength_of(options) is not None:
        raise SliderError(
            f"The conditioning comes from '{names.MASK_AND_SCHEDULE}', which cannot limit what '{node}' adds later; "
            f"expected '{node}' before it. Move '{names.MASK_AND_SCHEDULE}' after '{node}'."
        )
