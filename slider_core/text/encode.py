"""From a prompt and its phrases to a CONDITIONING that knows its spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..conditioning.span_strengths import Span, attach_spans, spanned_text
from ..errors import SliderError
from ..families import Family, family_of_encoders
from ..types import Conditioning
from .instructions import join_lines, read_marks
from .token_spans import CharRange, TokenizedPrompt, find_phrase, tokenize, tokenizers

if TYPE_CHECKING:
    from comfy.sd import CLIP

T5_TRAINING_TOKENS = 512
"""T5 rows in SliderEdit's training and in its code; ComfyUI pads to 256."""

SPLITTERS: dict[str, Callable[[str], tuple[str, list[CharRange]]]] = {
    "one per line": join_lines,
    "[[marked]] phrases": read_marks,
}


def encode_instructions(clip: CLIP, text: str, mode: str, pad_to: int | None) -> tuple[Conditioning, str, list[Span]]:
    """Encode the sub-instructions of `text`, split as `mode` (a key of SPLITTERS) says.

    pad_to: rows of text at least; None leaves that to ComfyUI.
    Returns the conditioning with its spans, the prompt that was encoded, and the spans.
    Raises SliderError for an empty prompt, bad marks, phrases without tokens, or an encoder of another family.
    """
    prompt, ranges = SPLITTERS[mode](text)
    family = family_of_encoders(set(tokenizers(clip)))
    tokenized = tokenize(clip, prompt, **_padded(family, pad_to))
    spans = [_span(tokenized, family.context_encoder, r) for r in ranges]
    conditioning = encode_prompt(clip, prompt, pad_to)
    return _attached(conditioning, tokenized, family.context_encoder, spans), prompt, spans


def encode_prompt(clip: CLIP, prompt: str, pad_to: int | None) -> Conditioning:
    """Encode a prompt, padded as in encode_instructions."""
    options = _padded(family_of_encoders(set(tokenizers(clip))), pad_to)
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt, tokenizer_options=options))


def select_phrase(conditioning: Conditioning, clip: CLIP, prompt: str, phrase: str, occurrence: int) -> Conditioning:
    """Add a phrase of `prompt` as a further span to the conditioning that `clip` made of it (see find_phrase).

    With occurrence 0 all places of the phrase form one span. Raises SliderError when the phrase is not in the prompt
    or the conditioning was made otherwise.
    """
    family = family_of_encoders(set(tokenizers(clip)))
    options = {f"{family.context_encoder}_min_length": T5_TRAINING_TOKENS}
    tokenized, padded = tokenize(clip, prompt), tokenize(clip, prompt, **options)
    if _rows(conditioning) == len(padded.tokens[family.context_encoder]):
        tokenized = padded
    places = find_phrase(tokenized.visible, phrase, occurrence)
    found = sorted({row for place in places for row in tokenized.token_indices(family.context_encoder, place)})
    return _attached(conditioning, tokenized, family.context_encoder, [Span(phrase.strip(), tuple(found))])


def _padded(family: Family, pad_to: int | None) -> dict[str, int]:
    """Options of a tokenizer."""
    return {} if pad_to is None else {f"{family.context_encoder}_min_length": pad_to}


def _attached(conditioning: Conditioning, tokenized: TokenizedPrompt, encoder: str, spans: list[Span]) -> Conditioning:
    return attach_spans(conditioning, len(tokenized.tokens[encoder]), spans, tokenized.padding(encoder))


def _rows(conditioning: Conditioning) -> int:
    cond, options = conditioning[0]
    known = spanned_text(options)
    return known.length if known else cond.shape[1]


def visible_text_range(tokenized: TokenizedPrompt, characters: CharRange) -> CharRange:
    """Where a sub-instruction stands in `visible`, given its raw characters. Raises SliderError if it has no words."""
    visible = tokenized.visible_range(*characters)
    if not tokenized.visible[visible.start : visible.end].strip():
        raw = tokenized.prompt[characters.start : characters.end]
        raise SliderError(f"{raw!r} has no words in it; expected some to give a strength to.")
    return visible


def _span(tokenized: TokenizedPrompt, encoder: str, characters: CharRange) -> Span:
    words = visible_text_range(tokenized, characters)
    text = tokenized.visible[words.start : words.end].strip()
    return Span(text, tokenized.token_indices(encoder, words))
