"""From a prompt and its instructions to a CONDITIONING with spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..conditioning.span_strengths import Span, attach_spans, spanned_text
from ..errors import SliderError
from ..families import family_of_encoders
from ..types import Conditioning
from .instructions import join_lines, read_marks
from .token_spans import CharRange, TokenizedPrompt, find_phrase, tokenize, tokenizers

if TYPE_CHECKING:
    from comfy.sd import CLIP

T5_TRAINING_TOKENS = 512
"""Number of T5 tokens that SliderEdit pads to in training and inference; ComfyUI's default is 256."""

SPLITTERS: dict[str, Callable[[str], tuple[str, list[CharRange]]]] = {
    "one per line": join_lines,
    "[[marked]] phrases": read_marks,
}
"""Ways to split text into instructions: mode, as saved in workflows -> text to (prompt, ranges of its instructions)."""


class EncodedInstructions(NamedTuple):
    """A prompt encoded with spans.

    conditioning: each of its entries carries `spans`. prompt: the text that was encoded.
    spans, ranges: tokens and raw character range of each instruction, in the same order.
    """

    conditioning: Conditioning
    prompt: str
    spans: list[Span]
    ranges: list[CharRange]


def encode_instructions(clip: CLIP, text: str, mode: str, pad_to: int | None) -> EncodedInstructions:
    """Encode the instructions of `text`, which is split by `mode` (a key of SPLITTERS).

    pad_to: minimum number of tokens of the context encoder; None for ComfyUI's default.
    Raises SliderError for an empty prompt, invalid marks, instructions without tokens, and text encoders of an
    unsupported model.
    """
    prompt, ranges = SPLITTERS[mode](text)
    encoder = family_of_encoders(set(tokenizers(clip))).context_encoder
    tokenized = tokenize(clip, prompt, **_padding_options(encoder, pad_to))
    spans = [_span(tokenized, encoder, characters) for characters in ranges]
    conditioning = _attach_spans(encode_prompt(clip, prompt, pad_to), tokenized, encoder, spans)
    return EncodedInstructions(conditioning, prompt, spans, ranges)


def encode_prompt(clip: CLIP, prompt: str, pad_to: int | None) -> Conditioning:
    """Encode a prompt without spans; `pad_to` as in encode_instructions.

    Raises SliderError for text encoders of an unsupported model.
    """
    options = _padding_options(family_of_encoders(set(tokenizers(clip))).context_encoder, pad_to)
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt, tokenizer_options=options))


def select_phrase(conditioning: Conditioning, clip: CLIP, prompt: str, phrase: str, occurrence: int) -> Conditioning:
    """Add a phrase of `prompt` as another span to the conditioning that `clip` encoded it to.

    occurrence: which occurrence of the phrase, counted from 1; 0 for all occurrences as a single span.
    Raises SliderError if the prompt does not contain the phrase that often (see find_phrase), or if the conditioning
    does not match the prompt and the CLIP.
    """
    encoder = family_of_encoders(set(tokenizers(clip))).context_encoder
    tokenized = tokenize(clip, prompt)
    padded = tokenize(clip, prompt, **_padding_options(encoder, T5_TRAINING_TOKENS))
    if _num_tokens(conditioning) == len(padded.token_ranges[encoder]):
        tokenized = padded
    ranges = find_phrase(tokenized.visible, phrase, occurrence)
    tokens = sorted({token for visible in ranges for token in tokenized.token_indices(encoder, visible)})
    return _attach_spans(conditioning, tokenized, encoder, [Span(phrase.strip(), tuple(tokens))])


def visible_text_range(tokenized: TokenizedPrompt, characters: CharRange) -> CharRange:
    """Convert an instruction's raw character range to its range of `tokenized.visible`.

    Raises SliderError if nothing in it is visible.
    """
    visible = tokenized.visible_range(*characters)
    if not tokenized.visible[visible.start : visible.end].strip():
        raw = tokenized.prompt[characters.start : characters.end]
        raise SliderError(f"{raw!r} contains no text that could have a strength; expected at least one word.")
    return visible


def _padding_options(encoder: str, pad_to: int | None) -> dict[str, int]:
    return {} if pad_to is None else {f"{encoder}_min_length": pad_to}


def _attach_spans(
    conditioning: Conditioning, tokenized: TokenizedPrompt, encoder: str, spans: list[Span]
) -> Conditioning:
    length, padding = len(tokenized.token_ranges[encoder]), tokenized.num_padding_tokens(encoder)
    return attach_spans(conditioning, length, spans, padding)


def _num_tokens(conditioning: Conditioning) -> int:
    cond, options = conditioning[0]
    text = spanned_text(options)
    return text.length if text else cond.shape[1]


def _span(tokenized: TokenizedPrompt, encoder: str, characters: CharRange) -> Span:
    visible = visible_text_range(tokenized, characters)
    text = tokenized.visible[visible.start : visible.end].strip()
    return Span(text, tokenized.token_indices(encoder, visible))
