"""Strengths without an adapter or a patch: differences between the prompt and the prompt without a sub-instruction.

v = v(P) + sum_k (s_k - 1) (v(P) - v(P without k)): classifier-free guidance (arXiv 2207.12598) with a scale of its own
for each sub-instruction. ComfyUI averages the entries of a conditioning by their weights, so this is a conditioning:
P weighs 1 - sum_k (1 - s_k), and P without k weighs 1 - s_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy.conds import CONDRegular

from .. import keys
from .. import node_names as names
from ..conditioning.masks import validate_mask
from ..conditioning.outside_strength import StrengthCarrier
from ..conditioning.per_image_cond import batch_size_check
from ..conditioning.schedule import check_schedule_range, split_by_schedule
from ..conditioning.span_strengths import Span, check_instruction_numbers, check_strength_count
from ..errors import SliderError
from ..strength import Strengths, batch_size, validate_strengths
from ..text.encode import SPLITTERS, encode_instructions, encode_prompt
from ..text.instructions import remove_instruction
from ..types import Conditioning

if TYPE_CHECKING:
    from comfy.sd import CLIP


@dataclass(frozen=True)
class PromptWeights(StrengthCarrier):
    """Marks a conditioning entry whose strengths are the weights of its prompts."""

    refusal = (
        f"The strengths of '{names.PROMPT_DIFFERENCE}' are weights of prompts, which '{names.MASK_AND_SCHEDULE}' "
        f"cannot limit; expected sliders that act within one prompt. Use the mask, start and end of "
        f"'{names.PROMPT_DIFFERENCE}' itself."
    )

    def outside(self, options: Mapping[str, Any], strength: float) -> Mapping[str, CONDRegular]:
        raise SliderError(self.refusal)


@dataclass(frozen=True, eq=False)
class PromptDifferences:
    """A prompt, encoded whole and without each of its sub-instructions."""

    prompt: str
    spans: list[Span]
    whole: Conditioning
    without: list[Conditioning]

    def with_strengths(
        self,
        values: Mapping[str, object],
        mask: torch.Tensor | None = None,
        start: float = 0.0,
        end: float = 1.0,
        chosen: Sequence[int] = (),
    ) -> Conditioning:
        """The conditioning at some strengths: the k-th of `values` (input name -> strength) for the k-th instruction.

        mask: (height, width) or (1 or images, height, width), what strengths are multiplied by. start, end: the part of
        the schedule, 0 to 1, in which they hold; outside they are 0. chosen: the sub-instructions, counted from 1, that
        mask and part are for; none: all. Entries without weight are left out; each beyond the first costs a model
        evaluation per step.
        Raises SliderError as set_strengths does, for a mask that is none or whose number does not fit, for a part that
        is none and for a chosen sub-instruction that is not there.
        """
        check_schedule_range(start, end)
        strengths = {name: validate_strengths(value, name) for name, value in values.items()}
        check_strength_count(self.spans, strengths)
        check_instruction_numbers(self.spans, chosen)
        images, everywhere = batch_size(strengths), torch.ones(1, 1, 1)
        place = everywhere if mask is None else _place(mask, images)
        placed = [not chosen or k in chosen for k in range(1, len(self.spans) + 1)]
        absent = [
            _absence(strength, images, place if here else everywhere)
            for strength, here in zip(strengths.values(), placed)
        ]
        inside = self._weighing(absent)
        outside = [everywhere if here else own for own, here in zip(absent, placed)]
        if all(bool((own == other).all()) for own, other in zip(absent, outside)):
            return inside
        return split_by_schedule(inside, self._weighing(outside), start, end)

    def _weighing(self, absent: Sequence[torch.Tensor]) -> Conditioning:
        """The entries where the k-th instruction is absent by the k-th of `absent`: (1 or images, height, width)."""
        weights = [1 - torch.stack(torch.broadcast_tensors(*absent)).sum(0), *absent]
        parts = zip([self.whole, *self.without], weights)
        return [
            [cond, {**options, keys.PROMPT_WEIGHTS: PromptWeights(), **_weighted(weight)}]
            for part, weight in parts
            if weight.any()
            for cond, options in part
        ]


def encode_differences(clip: CLIP, text: str, mode: str, pad_to: int | None) -> PromptDifferences:
    """Encode the sub-instructions of `text` for PromptDifferences; arguments and errors as encode_instructions."""
    whole, prompt, spans = encode_instructions(clip, text, mode, pad_to)
    _, ranges = SPLITTERS[mode](text)
    return PromptDifferences(
        prompt, spans, whole, [encode_prompt(clip, remove_instruction(prompt, r), pad_to) for r in ranges]
    )


def _place(mask: torch.Tensor, images: int) -> torch.Tensor:
    """The mask as (1 or images, height, width), of one pixel where it is the same everywhere."""
    masks = validate_mask(mask).cpu()
    if len(masks) not in (1, images):
        raise SliderError(
            f"There are {len(masks)} masks, but {images} strength(s); expected one mask, or one per strength of a list."
        )
    pixel = masks[:, :1, :1]
    return pixel if (masks == pixel).all() else masks


def _absence(strength: Strengths, images: int, place: torch.Tensor) -> torch.Tensor:
    """1 - strength where the place is, of shape (images, height, width)."""
    values = torch.tensor(strength, dtype=torch.float64).expand(images)
    return (1 - values[:, None, None] * place).float()


def _weighted(weight: torch.Tensor) -> dict[str, Any]:
    """What gives a cond its weight of shape (images, height, width) in the average."""
    if (weight == 1).all():
        return {}
    if weight.numel() == 1:
        return {"strength": weight.item()}
    per_image = {keys.BATCH_SIZE_CHECK: batch_size_check(len(weight))}
    return {"mask": weight, "model_conds": per_image}
