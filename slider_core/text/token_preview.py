"""The tokens of each instruction in each text encoder, for display. Needs tokenizers only, no model weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import SliderError
from .encode import SPLITTERS, visible_text_range
from .token_spans import CharRange, TokenizedPrompt, tokenize, tokenizers

if TYPE_CHECKING:
    from comfy.sd import CLIP


class PhraseTokens(NamedTuple):
    """The tokens of one instruction.

    tokens: encoder ('t5xxl', 'clip_l') -> the tokens as strings of its vocabulary; empty if there is an error.
    error: why the instruction has no tokens, or ''.
    """

    tokens: dict[str, list[str]]
    error: str


def phrase_tokens(clip: CLIP, text: str, mode: str) -> list[PhraseTokens]:
    """The tokens of each instruction of `text`, which is split by `mode` (a key of SPLITTERS).

    Raises SliderError for an empty prompt and invalid marks.
    """
    prompt, ranges = SPLITTERS[mode](text)
    tokenized = tokenize(clip, prompt)
    token_strings = {name: _token_strings(clip, name, prompt) for name in tokenized.token_ranges}
    return [_phrase_tokens(tokenized, token_strings, characters) for characters in ranges]


def _phrase_tokens(
    tokenized: TokenizedPrompt, token_strings: dict[str, list[str]], characters: CharRange
) -> PhraseTokens:
    try:
        visible = visible_text_range(tokenized, characters)
        indices = {name: tokenized.token_indices(name, visible) for name in token_strings}
    except SliderError as error:
        return PhraseTokens({}, str(error))
    return PhraseTokens({name: [token_strings[name][i] for i in tokens] for name, tokens in indices.items()}, "")


def _token_strings(clip: CLIP, encoder: str, prompt: str) -> list[str]:
    tokenizer = tokenizers(clip)[encoder]
    batches = tokenizer.tokenize_with_weights(prompt, tokenizer_options=clip.tokenizer_options)
    ids = [token[0] for batch in batches for token in batch]
    return [tokenizer.tokenizer.convert_ids_to_tokens(i) if isinstance(i, int) else "embedding" for i in ids]
