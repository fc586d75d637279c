"""Limits sliders to a mask and to a range of the sampling schedule.

ComfyUI averages the predictions of the entries of a CONDITIONING, weighted by their masks. A mask therefore splits an
entry into two: one with its own strengths, weighted by the mask, and one with the outside strength, weighted by
1 - mask. The schedule range is looked up in each model call and costs nothing. Limits of single instructions are split
by schedule in the same way: no model call has more than one of these entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.conds import CONDConstant
from comfy.utils import common_upscale, repeat_to_batch_size

from .. import keys
from .. import node_names as names
from ..errors import SliderError
from ..strength import validate_strengths
from ..types import CondEntry, Conditioning
from .masks import validate_mask
from .outside_strength import OutsideStrength, carriers_of, outside_strength_of
from .per_image_cond import MaskBatchCheck
from .schedule import check_schedule_range, split_by_schedule
from .span_strengths import set_strength_of

_OUTSIDE_KEYS = (keys.OUTSIDE_STRENGTH, keys.OUTSIDE_SUPPRESSION, keys.OUTSIDE_PADDING, keys.OUTSIDE_OFFSETS)


def apply_mask_and_schedule(
    conditioning: Conditioning,
    mask: torch.Tensor | None = None,
    start: float = 0.0,
    end: float = 1.0,
    outside_strength: float = 0.0,
    instructions: Sequence[int] = (),
) -> Conditioning:
    """Limit the strengths of a conditioning to `mask` and to start..end of the schedule.

    mask: (H, W) or (images, H, W), 0 to 1, of any size; values between blend. None: everywhere.
    outside_strength: of all sliders outside: the spans of every channel, the projector, and GSTLoRAs on the model.
    instructions: the ones to limit, counted from 1; all other sliders keep their strengths. Empty: all sliders.
    Costs one more model evaluation per step and entry, none if the mask is all ones or all zeros.
    Raises SliderError for invalid masks and ranges, and for entries that cannot be split.
    """
    [strength] = validate_strengths([outside_strength], "outside_strength")
    for _, options in conditioning:
        for carrier in carriers_of(options):
            if carrier.refusal is not None:
                raise SliderError(carrier.refusal)
    check_schedule_range(start, end)
    if mask is not None:
        mask = validate_mask(mask)
        if bool((mask == 1).all()):
            mask = None
    if instructions:
        split = (_limit_instructions(entry, mask, strength, start, end, instructions) for entry in conditioning)
    else:
        inside = None if (start, end) == (0, 1) else (start, end)
        split = (_limit_all(entry, mask, strength, inside) for entry in conditioning)
    return [entry for entries in split for entry in entries]


def _limit_instructions(
    entry: CondEntry, mask: torch.Tensor | None, strength: float, start: float, end: float, instructions: Sequence[int]
) -> list[CondEntry]:
    outside = [entry[0], set_strength_of(entry[1], instructions, strength)]
    inside = [entry] if mask is None else _split_by_mask(entry, outside, mask)
    return split_by_schedule(inside, [outside], start, end)


def _limit_all(
    entry: CondEntry, mask: torch.Tensor | None, strength: float, schedule_range: tuple[float, float] | None
) -> list[CondEntry]:
    inside = entry if schedule_range is None else _with_outside(entry, OutsideStrength(strength, schedule_range))
    if mask is None:
        return [inside]
    outside = _with_outside(entry, OutsideStrength(strength, None))
    if outside_strength_of(inside[1]) == outside_strength_of(outside[1]):
        return [inside]
    return _split_by_mask(inside, outside, mask)


def _split_by_mask(inside: CondEntry, outside: CondEntry, mask: torch.Tensor) -> list[CondEntry]:
    if not mask.any():
        return [outside]
    _check_maskable(inside[1])
    entries = (_with_mask(inside, mask), _with_mask(outside, 1 - mask))
    return [entry for entry in entries if entry[1]["mask"].any()]


def _with_outside(entry: CondEntry, outside: OutsideStrength) -> CondEntry:
    """The entry with an outside strength, its schedule range intersected with that of an earlier limit."""
    cond, options = entry
    earlier = outside_strength_of(options)
    if earlier is not None and outside.inside is not None:
        if earlier.strength != outside.strength:
            raise SliderError(
                f"One '{names.MASK_AND_SCHEDULE}' has the outside strength {earlier.strength}, a later one with a "
                f"schedule has {outside.strength}; expected the same in both. Set the schedule in the first one."
            )
        inside = None
        if earlier.inside is not None:
            inside = max(earlier.inside[0], outside.inside[0]), min(earlier.inside[1], outside.inside[1])
        outside = OutsideStrength(outside.strength, inside)
    conds = {key: value for key, value in options.get("model_conds", {}).items() if key not in _OUTSIDE_KEYS}
    conds[keys.OUTSIDE_STRENGTH] = CONDConstant(outside)
    for carrier in carriers_of(options):
        conds |= carrier.outside(options, outside.strength)
    return [cond, {**options, "model_conds": conds}]


def _check_maskable(options: dict[str, Any]) -> None:
    if options.get("set_area_to_bounds"):
        raise SliderError(
            "The conditioning has a mask that also crops ('mask bounds'), which cannot be combined with another mask; "
            "expected set_cond_area 'default' in 'Conditioning (Set Mask)'."
        )
    if "default" in options:
        raise SliderError(
            "The conditioning is a default one, which ComfyUI uses wherever no other applies, so it takes no mask. "
            "Give the mask to the other conditionings, or remove this one from 'Cond Set Default Combine'."
        )


def _with_mask(entry: CondEntry, mask: torch.Tensor) -> CondEntry:
    cond, options = entry
    product = _multiply_masks(options.get("mask"), mask)
    conds = {**options.get("model_conds", {}), keys.BATCH_SIZE_CHECK: MaskBatchCheck(torch.zeros(len(product), 1))}
    return [cond, {**options, "mask": product, "model_conds": conds, "set_area_to_bounds": False}]


def _multiply_masks(own: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Elementwise product of two masks, both first resized to the larger height, width and batch size."""
    if own is None:
        return mask
    own = own.to(mask) if own.ndim == 3 else own.to(mask)[None]
    batch_size, height, width = map(max, own.shape, mask.shape)
    first, second = (
        repeat_to_batch_size(common_upscale(one[:, None], width, height, "nearest-exact", "disabled")[:, 0], batch_size)
        for one in (own, mask)
    )
    return first * second
