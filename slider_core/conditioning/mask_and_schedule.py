"""Where and when sliders act: inside a mask, and in a part of the denoising.

ComfyUI averages what the entries of a CONDITIONING predict, weighted by their masks. So an entry is divided in two:
one with its strengths, weighted by the mask, and one with the strength elsewhere, weighted by the rest. The part of the
denoising is looked up in each model call and costs nothing. Some sub-instructions alone are divided in time likewise:
no model call has more than one of these entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.conds import CONDConstant
from comfy.utils import common_upscale, repeat_to_batch_size

from ..adapters.strength_projector import offsets_at
from ..errors import SliderError
from ..patching.forward_patches import COND_PREFIX
from ..strength import validate_strengths
from ..training_free.prompt_difference import WEIGHED
from ..types import CondEntry
from .masks import validate_mask
from .outside_strength import PREFIX, PROJECTOR, Elsewhere, elsewhere_of
from .per_image_cond import PerImageCond
from .schedule import check_schedule_range, split_by_schedule
from .span_strengths import Conditioning, spans_at, with_some_at

_MASKS = COND_PREFIX + "masks"
_ALWAYS = (1.0, 0.0)  # no step lies inside


def where_and_when(
    conditioning: Conditioning,
    mask: torch.Tensor | None = None,
    start: float = 0.0,
    end: float = 1.0,
    elsewhere: float = 0.0,
    chosen: Sequence[int] = (),
) -> Conditioning:
    """The conditioning with its strengths inside `mask` and start..end of the schedule, `elsewhere` outside.

    mask: (H, W) or (images, H, W), 0 to 1, of any size; between 0 and 1 it blends. None is all ones.
    elsewhere: one strength for all sliders: every channel's spans, the projector, the model's GSTLoRAs.
    chosen: the sub-instructions, counted from 1, that this is for; the other sliders are left alone. None: all sliders.
    Costs one more model evaluation per step and entry, none where the mask is all ones or all zeros.
    Raises SliderError for a mask or schedule that is none, and for entries that cannot be divided.
    """
    [strength] = validate_strengths([elsewhere], "elsewhere")
    if any(WEIGHED in options for _, options in conditioning):
        raise SliderError(
            "The strengths of 'Prompt Difference' are weights of its prompts, which 'Where and When' does not change; "
            "expected sliders that act on one prompt. Use the mask, start and end of 'Prompt Difference' itself."
        )
    check_schedule_range(start, end)
    if mask is not None:
        mask = validate_mask(mask)
        if bool((mask == 1).all()):
            mask = None
    if chosen:
        each = (_divided_for(entry, mask, strength, start, end, chosen) for entry in conditioning)
    else:
        part = None if (start, end) == (0, 1) else (start, end)
        each = (_divided(entry, mask, strength, part) for entry in conditioning)
    return [piece for pieces in each for piece in pieces]


def _divided_for(
    entry: CondEntry, mask: torch.Tensor | None, strength: float, start: float, end: float, chosen: Sequence[int]
) -> list[CondEntry]:
    outside = [entry[0], with_some_at(entry[1], chosen, strength)]
    inside = [entry] if mask is None else _by_mask(entry, outside, mask)
    return split_by_schedule(inside, [outside], start, end)


def _divided(
    entry: CondEntry, mask: torch.Tensor | None, strength: float, part: tuple[float, float] | None
) -> list[CondEntry]:
    inside = entry if part is None else _limited(entry, Elsewhere(strength, *part))
    if mask is None:
        return [inside]
    outside = _limited(entry, Elsewhere(strength, *_ALWAYS))
    if elsewhere_of(inside[1]) == elsewhere_of(outside[1]):
        return [inside]
    return _by_mask(inside, outside, mask)


def _by_mask(inside: CondEntry, outside: CondEntry, mask: torch.Tensor) -> list[CondEntry]:
    if not mask.any():
        return [outside]
    _check_divisible(inside[1])
    pieces = (_masked(inside, mask), _masked(outside, 1 - mask))
    return [piece for piece in pieces if piece[1]["mask"].any()]


def _limited(entry: CondEntry, new: Elsewhere) -> CondEntry:
    """The entry with its own strengths where `new` lets it have them, and where an earlier limit does."""
    cond, options = entry
    known = elsewhere_of(options)
    always = (new.start, new.end) == _ALWAYS
    if known is not None and not always:
        if known.strength != new.strength:
            raise SliderError(
                f"The strength elsewhere is {known.strength} by one 'Where and When' and {new.strength} by a later one "
                "with a schedule; expected the same of both. Give the schedule to the first of them."
            )
        new = Elsewhere(new.strength, max(known.start, new.start), min(known.end, new.end))
    conds = {key: value for key, value in options.get("model_conds", {}).items() if not key.startswith(PREFIX)}
    conds |= {PREFIX: CONDConstant(new), **spans_at(options, new.strength)}
    offsets = offsets_at(options, new.strength)
    if offsets is not None:
        conds[PROJECTOR] = offsets
    return [cond, {**options, "model_conds": conds}]


def _check_divisible(options: dict[str, Any]) -> None:
    if options.get("set_area_to_bounds"):
        raise SliderError(
            "The conditioning has a mask that also crops ('mask bounds'), which cannot be divided by another mask; "
            "expected set_cond_area 'default' in 'Conditioning (Set Mask)'."
        )
    if "default" in options:
        raise SliderError(
            "The conditioning is a default one, which ComfyUI puts wherever no other is, so it takes no mask. "
            "Give the mask to the others, or take this one out of 'Cond Set Default Combine'."
        )


def _masked(entry: CondEntry, mask: torch.Tensor) -> CondEntry:
    cond, options = entry
    whole = _product(options.get("mask"), mask)
    conds = {**options.get("model_conds", {}), _MASKS: PerImageCond(torch.zeros(len(whole), 1))}
    return [cond, {**options, "mask": whole, "model_conds": conds, "set_area_to_bounds": False}]


def _product(own: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Of two masks, as high, as wide and for as many images as the larger of both is."""
    if own is None:
        return mask
    own = own.to(mask) if own.ndim == 3 else own.to(mask)[None]
    images, height, width = map(max, own.shape, mask.shape)
    first, second = (
        repeat_to_batch_size(common_upscale(one[:, None], width, height, "nearest-exact", "disabled")[:, 0], images)
        for one in (own, mask)
    )
    return first * second
