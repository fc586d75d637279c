"""Guidance along the difference between a prompt and the prompt without one of its instructions.

    v = v(P) + sum_k (s_k - 1) (v(P) - v(P_k))

v(P): velocity for the whole prompt. P_k: the prompt without instruction k. s_k: strength of instruction k. This is
classifier-free guidance (arXiv 2207.12598) with a guidance scale per instruction. ComfyUI averages the predictions of a
conditioning's entries by their weights, so v is a conditioning: P has weight 1 - sum_k (1 - s_k), P_k has weight
1 - s_k.
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
from ..conditioning.per_image_cond import PerImageCond
from ..conditioning.schedule import check_schedule_range, split_by_schedule
from ..conditioning.span_strengths import Span, check_instruction_numbers, check_strength_count
from ..errors import SliderError
from ..strength import Strengths, batch_size, validate_strengths
from ..text.encode import encode_instructions, encode_prompt
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
    """The encodings from which with_strengths builds a conditioning.

    prompt: P as text, with `spans`, the tokens of its instructions. full: conditioning of P.
    leave_one_out: one conditioning per instruction, of the prompt without it (P_k).
    """

    prompt: str
    spans: list[Span]
    full: Conditioning
    leave_one_out: list[Conditioning]

    def with_strengths(
        self,
        values: Mapping[str, object],
        mask: torch.Tensor | None = None,
        start: float = 0.0,
        end: float = 1.0,
        chosen: Sequence[int] = (),
    ) -> Conditioning:
        """The conditioning in which the k-th instruction has the k-th of `values` (input name -> strength).

        mask: (height, width) or (1 or images, height, width), 0 to 1; strengths are multiplied by it.
        start, end: schedule range, as fractions of the sampling steps (0 to 1); outside it the strengths are 0.
        chosen: numbers, counted from 1, of the instructions that mask and range apply to; empty for all.
        Entries of weight 0 are left out; each entry after the first costs one model evaluation per step.
        Raises SliderError as set_strengths does, and for an invalid mask, a number of masks that does not match the
        lists of strengths, an invalid range, and a chosen instruction that does not exist.
        """
        check_schedule_range(start, end)
        strengths = {name: validate_strengths(value, name) for name, value in values.items()}
        check_strength_count(self.spans, strengths)
        check_instruction_numbers(self.spans, chosen)
        images, everywhere = batch_size(strengths), torch.ones(1, 1, 1)
        compact_mask = everywhere if mask is None else _compact_mask(mask, images)
        limited = [not chosen or k in chosen for k in range(1, len(self.spans) + 1)]
        inside = [
            _masked_suppression(strength, images, compact_mask if is_limited else everywhere)
            for strength, is_limited in zip(strengths.values(), limited)
        ]
        outside = [everywhere if is_limited else own for own, is_limited in zip(inside, limited)]
        entries = self._weighted_entries(inside)
        if all(bool((own == other).all()) for own, other in zip(inside, outside)):
            return entries
        return split_by_schedule(entries, self._weighted_entries(outside), start, end)

    def _weighted_entries(self, suppressions: Sequence[torch.Tensor]) -> Conditioning:
        """Entries for the suppression 1 - s_k of each instruction, of shape (1 or images, height, width)."""
        weights = [1 - torch.stack(torch.broadcast_tensors(*suppressions)).sum(0), *suppressions]
        return [
            [cond, {**options, keys.PROMPT_WEIGHTS: PromptWeights(), **_weight_options(weight)}]
            for conditioning, weight in zip([self.full, *self.leave_one_out], weights)
            if weight.any()
            for cond, options in conditioning
        ]


def encode_differences(clip: CLIP, text: str, mode: str, pad_to: int | None) -> PromptDifferences:
    """Encode `text` with and without each of its instructions; arguments and errors as for encode_instructions."""
    full, prompt, spans, ranges = encode_instructions(clip, text, mode, pad_to)
    leave_one_out = [encode_prompt(clip, remove_instruction(prompt, r), pad_to) for r in ranges]
    return PromptDifferences(prompt, spans, full, leave_one_out)


def _compact_mask(mask: torch.Tensor, images: int) -> torch.Tensor:
    """The mask as (1 or images, height, width), reduced to one pixel if each of its images is uniform."""
    masks = validate_mask(mask).cpu()
    if len(masks) not in (1, images):
        raise SliderError(
            f"There are {len(masks)} masks for {images} strength(s); expected one mask, or one mask per strength of a "
            "list."
        )
    pixel = masks[:, :1, :1]
    return pixel if (masks == pixel).all() else masks


def _masked_suppression(strength: Strengths, images: int, mask: torch.Tensor) -> torch.Tensor:
    """1 - strength * mask, of shape (images, height, width)."""
    values = torch.tensor(strength, dtype=torch.float64).expand(images)
    return (1 - values[:, None, None] * mask).float()


def _weight_options(weight: torch.Tensor) -> dict[str, Any]:
    """Options that give an entry this weight, of shape (images, height, width), in ComfyUI's average."""
    if (weight == 1).all():
        return {}
    if weight.numel() == 1:
        return {"strength": weight.item()}
    per_image = {keys.BATCH_SIZE_CHECK: PerImageCond(weight[:, 0, :1])}
    return {"mask": weight, "model_conds": per_image}
