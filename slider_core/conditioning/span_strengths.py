"""Spans of a prompt and their strengths, attached to a CONDITIONING.

The dict of a conditioning entry holds a SpannedText (which tokens form which span). Once a strength differs from 1, its
`model_conds` hold a tensor with the suppression (1 - strength) of every text token, which ComfyUI repeats to the batch
size, concatenates over conds and passes to the model call. Strengths therefore act on their own conditioning only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.conds import CONDRegular

from .. import keys
from .. import node_names as names
from ..errors import SliderError
from ..patching.forward_patches import ForwardContext
from ..strength import Strengths, batch_size, suppression, validate_strengths
from ..types import Conditioning
from .outside_strength import (
    StrengthCarrier,
    current_outside_strength,
    outside_strength_of,
    require_before_mask_and_schedule,
)
from .per_image_cond import PerImageCond

DEFAULT_CHANNEL = "default"


@dataclass(frozen=True)
class Span:
    """A phrase of the prompt, and the indices of its tokens among the model's text tokens."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class SpannedText(StrengthCarrier):
    """The spans of one encoded prompt and their strengths.

    length: number of text tokens. padding: how many of them, at the end, are padding.
    strengths: channel -> one entry per span. None, or missing at the end: a span that was added after the strengths
        were set; it counts as strength 1 and does not reduce the suppression of spans that overlap it.
    default_strengths: for channels that are not in `strengths`; only set where single instructions were limited to a
        mask or schedule range.
    """

    length: int
    spans: tuple[Span, ...] = ()
    padding: int = 0
    strengths: Mapping[str, tuple[Strengths | None, ...]] = field(default_factory=dict)
    default_strengths: tuple[Strengths | None, ...] = ()

    def outside(self, options: Mapping[str, Any], strength: float) -> Mapping[str, CONDRegular]:
        suppressions = _token_suppression(self, [(strength,)] * len(self.spans))
        if not suppressions.any():
            return {}
        return {keys.OUTSIDE_SUPPRESSION: PerImageCond(suppressions), keys.OUTSIDE_PADDING: _padding(self)}


def attach_spans(conditioning: Conditioning, length: int, spans: Sequence[Span], padding: int = 0) -> Conditioning:
    """The conditioning with `spans` added to every entry, after those that are already there.

    length: number of text tokens of the prompt that the spans were found in; padding: how many of them, at the end,
    are padding. Raises SliderError when the conditioning has another number of tokens, or has already been through
    'Limit Sliders (Mask and Schedule)'.
    """
    out = []
    for cond, options in conditioning:
        require_before_mask_and_schedule(options, names.SELECT_PHRASE)
        text = spanned_text(options) or SpannedText(cond.shape[1], padding=padding)
        _refuse_limited(text, f"'{names.SELECT_PHRASE}'")
        if text.length != length:
            raise SliderError(
                f"The conditioning has {text.length} text tokens, but this text encoder gives {length} for the prompt; "
                "expected a conditioning made from the same prompt by the same encoder. "
                "Connect the CLIP and the text that made it."
            )
        out.append([cond, {**options, keys.SPANNED_TEXT: replace(text, spans=(*text.spans, *spans))}])
    return out


def spanned_text(options: Mapping[str, Any]) -> SpannedText | None:
    """The SpannedText in the dict of a conditioning entry, if it has one."""
    return options.get(keys.SPANNED_TEXT)


def set_strengths(
    conditioning: Conditioning, values: Mapping[str, object], channel: str = DEFAULT_CHANNEL
) -> Conditioning:
    """Set the strength of the k-th span to the k-th of `values` (input name -> strength; missing ones count as 1).

    The suppression of a token is 1 - strength, multiplied where spans overlap (SliderEdit; tests/data/golden/README.md,
    case B5). Adapters read the strengths of one `channel`; strengths set on it before are replaced.
    Raises SliderError for invalid strengths, lists of different lengths, a strength other than 1 without a span, and
    spans without a strength.
    """
    strengths = {name: validate_strengths(value, name) for name, value in values.items()}
    return [[cond, _with_strengths(options, strengths, channel)] for cond, options in conditioning]


def _with_strengths(options: dict[str, Any], strengths: Mapping[str, Strengths], channel: str) -> dict[str, Any]:
    text = _require_spans(options)
    check_strength_count(text.spans, strengths)
    batch_size(strengths)
    _refuse_limited(text, "strengths")
    span_strengths = tuple(strengths.values())[: len(text.spans)]
    return _with_text(options, replace(text, strengths={**text.strengths, channel: span_strengths}))


def _refuse_limited(text: SpannedText, what: str) -> None:
    if text.default_strengths:
        raise SliderError(
            f"'{names.MASK_AND_SCHEDULE}' has already limited single instructions of this conditioning; expected "
            f"{what} before it. Move '{names.MASK_AND_SCHEDULE}' after."
        )


def _require_spans(options: Mapping[str, Any]) -> SpannedText:
    text = spanned_text(options)
    if text is None or not text.spans:
        raise SliderError(
            f"The conditioning has no instructions; expected one from '{names.ENCODE_INSTRUCTIONS}' or "
            f"'{names.SELECT_PHRASE}'."
        )
    return text


def set_strength_of(options: dict[str, Any], instructions: Sequence[int], strength: float) -> dict[str, Any]:
    """The dict of a conditioning entry with one strength for some of its spans, on all channels.

    instructions: which spans, counted from 1. Raises SliderError when one does not exist, and when the entry has
    another outside strength.
    """
    text, outside = _require_spans(options), outside_strength_of(options)
    check_instruction_numbers(text.spans, instructions)
    if outside is not None and outside.strength != strength:
        raise SliderError(
            f"An earlier '{names.MASK_AND_SCHEDULE}' has the outside strength {outside.strength} for all sliders, a "
            f"later one {strength} for some; expected the same in both, or the one for some sliders first."
        )

    def replaced(strengths: Sequence[Strengths | None]) -> tuple[Strengths | None, ...]:
        per_span = [*strengths, *[None] * (len(text.spans) - len(strengths))]
        unset = None if strength == 1 else (strength,)
        return tuple(
            (unset if old is None else (strength,)) if number in instructions else old
            for number, old in enumerate(per_span, 1)
        )

    by_channel = {channel: replaced(strengths) for channel, strengths in text.strengths.items()}
    default_strengths = replaced(text.default_strengths or [(1.0,)] * len(text.spans))
    return _with_text(options, replace(text, strengths=by_channel, default_strengths=default_strengths))


def _with_text(options: Mapping[str, Any], text: SpannedText) -> dict[str, Any]:
    """The dict of a conditioning entry with a SpannedText and with its strengths in `model_conds`."""
    conds = dict(options.get("model_conds", {}))
    by_key = {
        (keys.suppression(channel), keys.padding(channel)): strengths for channel, strengths in text.strengths.items()
    }
    by_key[keys.DEFAULT_SUPPRESSION, keys.DEFAULT_PADDING] = text.default_strengths
    for (suppression_key, padding_key), strengths in by_key.items():
        conds.pop(suppression_key, None)
        conds.pop(padding_key, None)
        suppressions = _token_suppression(text, strengths)
        if suppressions.any():
            conds |= {suppression_key: PerImageCond(suppressions), padding_key: _padding(text)}
    return {**options, keys.SPANNED_TEXT: text, "model_conds": conds}


def _padding(text: SpannedText) -> PerImageCond:
    return PerImageCond(torch.tensor([[text.padding]]))


def check_instruction_numbers(spans: Sequence[Span], instructions: Sequence[int]) -> None:
    """Raise SliderError for an instruction number, counted from 1, that does not exist."""
    if missing := [number for number in instructions if not 1 <= number <= len(spans)]:
        listed = "; ".join(f"{number} = {span.text!r}" for number, span in enumerate(spans, 1))
        raise SliderError(f"There is no instruction {missing[0]}; expected numbers from 1 to {len(spans)}: {listed}.")


def check_strength_count(spans: Sequence[Span], strengths: Mapping[str, Strengths]) -> None:
    """Raise SliderError for spans without a strength, and for a strength other than 1 without a span."""
    count = len(spans)
    if count > len(strengths):
        raise SliderError(
            f"There are {count} instructions but only {len(strengths)} strengths; "
            f"use at most {len(strengths)} instructions."
        )
    for k, (name, strength) in enumerate(strengths.items()):
        if k >= count and set(strength) != {1.0}:
            raise SliderError(
                f"{name} is {', '.join(map(str, strength))}, but there are only {count} instruction(s): "
                + "; ".join(repr(span.text) for span in spans)
                + ". Set it back to 1 or add an instruction."
            )


def _token_suppression(text: SpannedText, strengths: Sequence[Strengths | None]) -> torch.Tensor:
    """Suppression of every token, (images, tokens): product of the suppressions of its spans, 0 outside all spans."""
    with_strength = [
        (list(span.tokens), strength) for span, strength in zip(text.spans, strengths) if strength is not None
    ]
    num_images = max((len(strength) for _, strength in with_strength), default=1)
    suppressions = torch.zeros(num_images, text.length)
    suppressions[:, sorted({token for tokens, _ in with_strength for token in tokens})] = 1.0
    for tokens, strength in with_strength:
        suppressions[:, tokens] *= suppression(strength, num_images)[:, None]
    return suppressions


def token_suppression(context: ForwardContext, channel: str) -> torch.Tensor | None:
    """The suppression (1 - strength) of every text token of a model call, (batch, tokens); None if all strengths are 1.

    Outside a mask or schedule range it is that of the outside strength, on every channel.
    Raises SliderError when the text is shorter than the one that the spans were found in.
    """
    suppressions = context.conds.get(_keys_of(context, channel)[0])
    if suppressions is None:
        return None
    missing = context.num_text_tokens - suppressions.shape[1]
    if missing < 0:
        raise SliderError(
            f"The spans were found in a text of {suppressions.shape[1]} tokens, but the model got "
            f"{context.num_text_tokens}; expected the conditioning that the spans were made with. Was it truncated, or "
            "made by another encoder?"
        )
    return torch.nn.functional.pad(suppressions, (0, missing))


def token_strengths(context: ForwardContext, channel: str) -> torch.Tensor | None:
    """Strength of every text token of a model call, (batch, tokens), 1 outside all spans; None if all are 1.

    Raises SliderError as token_suppression does.
    """
    suppressions = token_suppression(context, channel)
    return None if suppressions is None else 1.0 - suppressions


def padding_token(context: ForwardContext, channel: str) -> int:
    """Index of a padding token of a text whose token_suppression is not None. Raises SliderError if a text has none."""
    suppression_key, padding_key = _keys_of(context, channel)
    if (context.conds[padding_key] < 1).any():
        raise SliderError(
            "The prompt has no padding tokens to replace its own tokens with; expected at least one after its end. "
            "Switch on pad_to_512 where it is encoded, or shorten the prompt."
        )
    return context.conds[suppression_key].shape[1] - 1


def _keys_of(context: ForwardContext, channel: str) -> tuple[str, str]:
    """Keys of the tokens' suppression and of the padding that apply to a channel in this model call."""
    if current_outside_strength(context) is not None:
        return keys.OUTSIDE_SUPPRESSION, keys.OUTSIDE_PADDING
    suppression_key = keys.suppression(channel)
    if suppression_key in context.conds:
        return suppression_key, keys.padding(channel)
    return keys.DEFAULT_SUPPRESSION, keys.DEFAULT_PADDING
