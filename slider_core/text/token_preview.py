"""What the phrases of a prompt become in each text encoder, for people to see. Needs tokenizers, no models."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import SliderError
from .encode import SPLITTERS, visible_text_range
from .token_spans import CharRange, TokenizedPrompt, tokenize, tokenizers

if TYPE_CHECKING:
    from comfy.sd import CLIP


class PhraseTokens(NamedTuple):
    """tokens: encoder ('t5xxl', 'clip_l') -> the pieces as its vocabulary spells them. error: why there are none."""

    tokens: dict[str, list[str]]
    error: str


def phrase_tokens(clip: CLIP, text: str, mode: str) -> list[PhraseTokens]:
    """The tokens of every sub-instruction of `text`, split as `mode` (a key of SPLITTERS) says.

    Raises SliderError for an empty prompt and bad marks.
    """
    prompt, ranges = SPLITTERS[mode](text)
    tokenized = tokenize(clip, prompt)
    spelled = {name: _spelled(clip, name, prompt) for name in tokenized.tokens}
    return [_tokens(tokenized, spelled, characters) for characters in ranges]


def _tokens(tokenized: TokenizedPrompt, spelled: dict[str, list[str]], characters: CharRange) -> PhraseTokens:
    try:
        words = visible_text_range(tokenized, characters)
        rows = {name: tokenized.token_indices(name, words) for name in spelled}
    except SliderError as error:
        return PhraseTokens({}, str(error))
    return PhraseTokens({name: [spelled[name][row] for row in found] for name, found in rows.items()}, "")


def _spelled(clip: CLIP, encoder: str, prompt: str) -> list[str]:
    tokenizer = tokenizers(clip)[encoder]
    batches = tokenizer.tokenize_with_weights(prompt, tokenizer_options=clip.tokenizer_options)
    rows = [row[0] for batch in batches for row in batch]
    return [tokenizer.tokenizer.convert_ids_to_tokens(row) if isinstance(row, int) else "embedding" for row in rows]
