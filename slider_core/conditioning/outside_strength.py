"""The strength that holds in place of a cond's own ones where, or while, these do not act.

A cond carries it beside its own strengths. Each model call has one of the two, so no step gets both or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SliderError
from ..patching.forward_patches import COND_PREFIX, ForwardContext

PREFIX = COND_PREFIX + "elsewhere"
SPANS, PADDING, PROJECTOR = PREFIX + ".spans", PREFIX + ".padding", PREFIX + ".projector"
"""Names in `model_conds`: scales of the text rows at the strength elsewhere, padded rows, the projector's offsets."""


@dataclass(frozen=True)
class Elsewhere:
    """A strength for all sliders, outside start..end of the schedule. With start > end it holds all the time."""

    strength: float
    start: float
    end: float

    def holds(self, context: ForwardContext) -> bool:
        return not context.within(self.start, self.end)


def strength_elsewhere(context: ForwardContext) -> float | None:
    """The strength of all sliders in a model call whose conds' own ones do not hold; None where they do."""
    elsewhere = context.conds.get(PREFIX)
    return elsewhere.strength if elsewhere is not None and elsewhere.holds(context) else None


def elsewhere_of(options: Mapping[str, Any]) -> Elsewhere | None:
    """The Elsewhere of one conditioning entry's dict, if it has one."""
    cond = options.get("model_conds", {}).get(PREFIX)
    return None if cond is None else cond.cond


def refuse_later(options: Mapping[str, Any], node: str) -> None:
    """Raise SliderError when `node` comes after the sliders of its conditioning were given their place."""
    if elsewhere_of(options) is not None:
        raise SliderError(
            f"The conditioning has been through 'Where and When', which does not know what '{node}' adds after it; "
            f"expected '{node}' first. Put 'Where and When' behind it."
        )
