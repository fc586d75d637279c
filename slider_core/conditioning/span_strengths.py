"""Spans and their strengths on a CONDITIONING, so that they act on that cond alone.

A cond's dict carries a SpannedText (what the spans are) and, once a strength differs from 1, a ready-made tensor in
`model_conds`, which ComfyUI repeats to the batch, concatenates over conds and hands to the model call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import SliderError
from ..patching.forward_patches import COND_PREFIX, ForwardContext
from ..strength import Strengths, batch_size, suppression, validate_strengths
from ..types import Conditioning
from .outside_strength import PADDING, SPANS, elsewhere_of, refuse_later, strength_elsewhere
from .per_image_cond import PerImageCond

SPAN_PREFIX = COND_PREFIX + "spans."
PADDING_PREFIX = COND_PREFIX + "padding."
_OTHERS, _OTHERS_PADDING = COND_PREFIX + "others.spans", COND_PREFIX + "others.padding"
DEFAULT_CHANNEL = "default"
_KEY = "edit_sliders"


@dataclass(frozen=True)
class Span:
    """A phrase of the prompt, and the indices of its tokens among the model's text tokens."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class SpannedText:
    """What is known of one encoded prompt: its length in rows, its spans, and how many rows at its end are padding.

    strengths: of the spans, by channel; None, or missing at the end, of spans that came after the strengths were set,
    which count as 1 but take nothing from the suppression of spans that they overlap. others: of the spans on channels
    that are missing; empty unless sub-instructions have a place of their own.
    """

    length: int
    spans: tuple[Span, ...] = ()
    padding: int = 0
    strengths: Mapping[str, tuple[Strengths | None, ...]] = field(default_factory=dict)
    others: tuple[Strengths | None, ...] = ()


def attach_spans(conditioning: Conditioning, length: int, spans: Sequence[Span], padding: int = 0) -> Conditioning:
    """Note the spans of a prompt that was tokenized to `length` rows on every entry of its conditioning.

    padding: how many of the rows, at the end, are padding.

    Spans that are already there stay in front. Raises SliderError when the conditioning is not `length` rows long, or
    has been given a place for the sliders it has.
    """
    out = []
    for cond, options in conditioning:
        refuse_later(options, "Select Phrase")
        known = spanned_text(options) or SpannedText(cond.shape[1], padding=padding)
        _refuse_placed(known, "'Select Phrase'")
        if known.length != length:
            raise SliderError(
                f"The conditioning has {known.length} text rows, but this text encoder gives {length} for the prompt; "
                "expected a conditioning made from the same prompt by the same encoder. "
                "Connect the CLIP and the text that made it."
            )
        out.append([cond, {**options, _KEY: replace(known, spans=(*known.spans, *spans))}])
    return out


def spanned_text(options: Mapping[str, Any]) -> SpannedText | None:
    """The SpannedText of one conditioning entry's dict, if it has one."""
    return options.get(_KEY)


def set_strengths(
    conditioning: Conditioning, values: Mapping[str, object], channel: str = DEFAULT_CHANNEL
) -> Conditioning:
    """Give the k-th span the k-th of `values` (input name -> strength; missing ones count as 1).

    The scale of a row is 1 - strength, multiplied where spans overlap, as in SliderEdit (golden case B5).
    Adapters listen on one `channel`. Strengths that were set on it before are replaced.
    Raises SliderError for values that are no strengths, lists of different length, a strength other than 1 without a
    span, and spans without a value.
    """
    strengths = {name: validate_strengths(value, name) for name, value in values.items()}
    return [[cond, _with_strengths(options, strengths, channel)] for cond, options in conditioning]


def _with_strengths(options: dict[str, Any], strengths: Mapping[str, Strengths], channel: str) -> dict[str, Any]:
    text = _spans_of(options)
    check_count(text.spans, strengths)
    batch_size(strengths)
    _refuse_placed(text, "strengths")
    own = tuple(strengths.values())[: len(text.spans)]
    return _with_text(options, replace(text, strengths={**text.strengths, channel: own}))


def _refuse_placed(text: SpannedText, what: str) -> None:
    if text.others:
        raise SliderError(
            f"Sub-instructions have been given a place of their own by 'Where and When'; expected {what} before it. "
            "Put 'Where and When' behind."
        )


def _spans_of(options: Mapping[str, Any]) -> SpannedText:
    text = spanned_text(options)
    if text is None or not text.spans:
        raise SliderError(
            "The conditioning has no sub-instructions; expected one from 'Encode Sub-Instructions' or 'Select Phrase'."
        )
    return text


def with_some_at(options: dict[str, Any], chosen: Sequence[int], strength: float) -> dict[str, Any]:
    """The options of a conditioning entry with this strength for some of its spans, on all channels.

    chosen: which ones, counted from 1. Raises SliderError when there are no such spans, or others hold elsewhere.
    """
    text, elsewhere = _spans_of(options), elsewhere_of(options)
    check_chosen(text.spans, chosen)
    if elsewhere is not None and elsewhere.strength != strength:
        raise SliderError(
            f"The strength elsewhere is {elsewhere.strength} for all sliders by an earlier 'Where and When', and "
            f"{strength} for some by a later one; expected the same of both, or the one for some first."
        )

    def changed(strengths: Sequence[Strengths | None]) -> tuple[Strengths | None, ...]:
        every = [*strengths, *[None] * (len(text.spans) - len(strengths))]
        new = None if strength == 1 else (strength,)
        return tuple((new if own is None else (strength,)) if k in chosen else own for k, own in enumerate(every, 1))

    by_channel = {channel: changed(strengths) for channel, strengths in text.strengths.items()}
    others = changed(text.others or [(1.0,)] * len(text.spans))
    return _with_text(options, replace(text, strengths=by_channel, others=others))


def _with_text(options: Mapping[str, Any], text: SpannedText) -> dict[str, Any]:
    """The options of a conditioning entry with a text, and what its strengths are in `model_conds`."""
    conds = dict(options.get("model_conds", {}))
    own = ((SPAN_PREFIX + name, PADDING_PREFIX + name, strengths) for name, strengths in text.strengths.items())
    for scale_name, padding_name, strengths in (*own, (_OTHERS, _OTHERS_PADDING, text.others)):
        conds.pop(scale_name, None)
        conds.pop(padding_name, None)
        scale = _scale(text, strengths)
        if scale.any():
            conds |= {scale_name: PerImageCond(scale), padding_name: _padding(text)}
    return {**options, _KEY: text, "model_conds": conds}


def _padding(text: SpannedText) -> PerImageCond:
    return PerImageCond(torch.tensor([[text.padding]]))


def check_chosen(spans: Sequence[Span], chosen: Sequence[int]) -> None:
    """Raise SliderError for a number, counted from 1, that no span has."""
    if missing := [number for number in chosen if not 1 <= number <= len(spans)]:
        listed = "; ".join(f"{k} = {span.text!r}" for k, span in enumerate(spans, 1))
        raise SliderError(
            f"There is no sub-instruction {missing[0]}; expected numbers from 1 to {len(spans)}: {listed}."
        )


def check_count(spans: Sequence[Span], strengths: Mapping[str, Strengths]) -> None:
    """Raise SliderError for spans without a strength, and for a strength other than 1 without a span."""
    count = len(spans)
    if count > len(strengths):
        raise SliderError(
            f"There are {count} sub-instructions but only {len(strengths)} strengths; "
            f"use at most {len(strengths)} sub-instructions."
        )
    for k, (name, strength) in enumerate(strengths.items()):
        if k >= count and set(strength) != {1.0}:
            raise SliderError(
                f"{name} is {', '.join(map(str, strength))}, but there are only {count} sub-instruction(s): "
                + "; ".join(repr(span.text) for span in spans)
                + ". Set it back to 1 or add a sub-instruction."
            )


def spans_at(options: Mapping[str, Any], strength: float) -> dict[str, PerImageCond]:
    """What a cond needs so that all its spans can have this strength elsewhere, on any channel: name -> cond."""
    text = spanned_text(options)
    scale = torch.zeros(0) if text is None else _scale(text, [(strength,)] * len(text.spans))
    if text is None or not scale.any():
        return {}
    return {SPANS: PerImageCond(scale), PADDING: _padding(text)}


def _scale(text: SpannedText, strengths: Sequence[Strengths | None]) -> torch.Tensor:
    """Scale of every row, shape (images, rows): product of the suppressions of its spans, 0 outside all."""
    known = [(list(span.tokens), strength) for span, strength in zip(text.spans, strengths) if strength is not None]
    images = max((len(strength) for _, strength in known), default=1)
    scale = torch.zeros(images, text.length)
    scale[:, sorted({row for rows, _ in known for row in rows})] = 1.0
    for rows, strength in known:
        scale[:, rows] *= suppression(strength, images)[:, None]
    return scale


def token_scales(context: ForwardContext, channel: str) -> torch.Tensor | None:
    """SliderEdit's scale of every text row of a model call, shape (batch, rows); None if no strength differs from 1.

    Where the strengths do not act, it is that of the strength elsewhere, on every channel.
    Raises SliderError when the text is shorter than the one the spans were found on.
    """
    scale = context.conds.get(_names(context, channel)[0])
    if scale is None:
        return None
    missing = context.num_text_tokens - scale.shape[1]
    if missing < 0:
        raise SliderError(
            f"The spans were found on a text of {scale.shape[1]} rows, but the model got {context.num_text_tokens}; "
            "expected the conditioning that the spans were made with. Was it cut, or made by another encoder?"
        )
    return torch.nn.functional.pad(scale, (0, missing))


def token_strengths(context: ForwardContext, channel: str) -> torch.Tensor | None:
    """Strength of every text row, 1 outside all spans; as token_scales."""
    scales = token_scales(context, channel)
    return None if scales is None else 1.0 - scales


def padding_token(context: ForwardContext, channel: str) -> int:
    """A row of padding in a text whose token_scales are not None. Raises SliderError when a text has none."""
    scales, padding = _names(context, channel)
    if (context.conds[padding] < 1).any():
        raise SliderError(
            "The prompt has no padding, whose tokens the words are to be replaced by; expected at least one row after "
            "the prompt's end. Switch pad_to_512 on where it is encoded, or shorten the prompt."
        )
    return context.conds[scales].shape[1] - 1


def _names(context: ForwardContext, channel: str) -> tuple[str, str]:
    """What the rows' scales and the padding of a channel are called in this model call."""
    if strength_elsewhere(context) is not None:
        return SPANS, PADDING
    own = SPAN_PREFIX + channel
    return (own, PADDING_PREFIX + channel) if own in context.conds else (_OTHERS, _OTHERS_PADDING)
