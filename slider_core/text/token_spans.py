"""The tokens of a phrase within ComfyUI's tokenization of the whole prompt.

Character ranges are mapped to tokens through the tokenizers' offset mappings. SliderEdit (arXiv 2511.09715) tokenizes
the phrase by itself and searches for its token ids in the prompt, which fails where the tokens depend on context
(mid-sentence tokens, adjacent punctuation, weights) and finds the first of several occurrences only.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from comfy.sd1_clip import SDTokenizer

from ..errors import SliderError
from .prompt_syntax import Segment, parse_prompt

if TYPE_CHECKING:
    from comfy.sd import CLIP


class CharRange(NamedTuple):
    """A half-open range of characters, start..end."""

    start: int
    end: int


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and the characters that each of its tokens stands for.

    visible: the prompt without weights and escapes, as passed to the tokenizers.
    char_indices: index in the raw `prompt` of each character of `visible`.
    token_ranges: encoder (ComfyUI's attribute name, 't5xxl' or 'clip_l') -> one entry per token of its output: the
        token's range of `visible`, or None for start, end and padding tokens.
    """

    prompt: str
    visible: str
    char_indices: tuple[int, ...]
    token_ranges: dict[str, tuple[CharRange | None, ...]]

    def visible_range(self, start: int, end: int) -> CharRange:
        """The range of `visible` that corresponds to characters start..end of the raw prompt."""
        return CharRange(bisect_left(self.char_indices, start), bisect_left(self.char_indices, end))

    def token_indices(self, encoder: str, visible: CharRange) -> tuple[int, ...]:
        """Indices of the tokens of `encoder` that overlap this range of `visible`, including partial overlaps.

        Raises SliderError if there are none.
        """
        ranges = self.token_ranges[encoder]
        tokens = tuple(
            i for i, r in enumerate(ranges) if r is not None and r.start < visible.end and visible.start < r.end
        )
        if not tokens:
            raise SliderError(
                f"The text encoder has no token for {self.visible[visible.start : visible.end]!r}; expected at least "
                "one letter, digit or symbol of its vocabulary. Choose a different phrase."
            )
        return tokens

    def num_padding_tokens(self, encoder: str) -> int:
        """Number of tokens of `encoder` after the end token."""
        ranges = self.token_ranges[encoder]
        last = max((i for i, r in enumerate(ranges) if r is not None), default=-1)
        return max(len(ranges) - last - 2, 0)


def tokenizers(clip: CLIP) -> dict[str, SDTokenizer]:
    """The tokenizers of a CLIP: ComfyUI's attribute name, such as 't5xxl' -> tokenizer."""
    return {name: t for name, t in vars(clip.tokenizer).items() if isinstance(t, SDTokenizer)}


def tokenize(clip: CLIP, prompt: str, **options: Any) -> TokenizedPrompt:
    """Tokenize as `clip.tokenize(prompt, tokenizer_options=options)` does, and keep the characters of each token.

    Raises SliderError for unpaired surrogates, and if ComfyUI's tokens differ from the ones computed here, so that a
    change of ComfyUI cannot lead to wrong tokens.
    """
    if surrogates := [char for char in prompt if "\ud800" <= char <= "\udfff"]:
        raise SliderError(
            f"The prompt contains {surrogates[0]!r}, which is half of a character. Delete it and type the character "
            "again."
        )
    options = {**clip.tokenizer_options, **options}
    segments = parse_prompt(prompt)
    visible = "".join(s.text for s in segments)
    char_indices = tuple(i for s in segments for i in s.char_indices)
    token_ranges = {
        name: _token_ranges(tokenizer, prompt, segments, options)
        for name, tokenizer in tokenizers(clip).items()
        if tokenizer.tokenizer.is_fast and not tokenizer.disable_weights
    }
    return TokenizedPrompt(prompt, visible, char_indices, token_ranges)


def find_phrase(text: str, phrase: str, occurrence: int = 1) -> list[CharRange]:
    """Ranges of `phrase` in the visible `text`: of the given occurrence, counted from 1, or of all of them for 0.

    Case-sensitive; any run of whitespace matches any other, and text is compared in Unicode normal form NFKC.
    Occurrences inside words count only if the phrase does not occur at word boundaries.
    Raises SliderError, with the most similar text, if the phrase does not occur, or does not occur often enough.
    """
    if not phrase.strip():
        raise SliderError("The phrase is empty; expected part of the prompt.")
    ranges = _search(text, phrase) or _search(text, "".join(s.text for s in parse_prompt(phrase)))
    if not ranges:
        raise SliderError(f"{phrase.strip()!r} is not in the prompt; {_most_similar(text, phrase)}")
    if occurrence == 0:
        return ranges
    if not 1 <= occurrence <= len(ranges):
        raise SliderError(
            f"{phrase.strip()!r} occurs {len(ranges)} time(s) in the prompt; there is no occurrence {occurrence}. "
            f"Choose 1 to {len(ranges)}, or 0 for all."
        )
    return [ranges[occurrence - 1]]


def _token_ranges(
    tokenizer: SDTokenizer, prompt: str, segments: list[Segment], options: dict[str, Any]
) -> tuple[CharRange | None, ...]:
    ours = [(w, *token) for w, group in enumerate(_token_groups(tokenizer, segments), 1) for token in group]
    batches = tokenizer.tokenize_with_weights(prompt, return_word_ids=True, tokenizer_options=options)
    comfy_tokens = [token for batch in batches for token in batch]  # (id or embedding vector, weight, word id)
    comfy_words = [token for token in comfy_tokens if token[2] != 0]
    same = len(ours) == len(comfy_words) and all(
        word == token[2]
        and weight == token[1]
        and (torch.is_tensor(token[0]) if token_id is None else token_id == token[0])
        for (word, token_id, weight, _), token in zip(ours, comfy_words)
    )
    if not same:
        raise SliderError(
            f"ComfyUI splits the prompt {prompt[:60]!r} into different tokens than expected, so the tokens of its "
            "phrases are unknown. Update this node pack, or remove embeddings and weights from the prompt."
        )
    ranges = iter(ours)
    return tuple(next(ranges)[3] if token[2] != 0 else None for token in comfy_tokens)


def _token_groups(
    tokenizer: SDTokenizer, segments: list[Segment]
) -> Iterator[list[tuple[int | None, float, CharRange]]]:
    """The tokens of each word as ComfyUI groups them: (id or None for an embedding vector, weight, visible range)."""
    offset = 0
    identifier = tokenizer.embedding_identifier
    for segment in segments:
        for start, end in _words(segment.text, identifier):
            word, positions = segment.text[start:end], list(range(offset + start, offset + end))
            if word.startswith(identifier) and tokenizer.embedding_directory is not None:
                vectors, _, rest = tokenizer._try_get_embedding(word[len(identifier) :].strip("\n"))
                word, positions, name_range = rest, *_split_positions(word, positions, rest)
                if vectors is not None:
                    count = 1 if vectors.ndim == 1 else vectors.shape[0]
                    yield [(None, segment.weight, name_range)] * count
                if rest == "":
                    continue
            yield [(token, segment.weight, r) for token, r in _tokenize_word(tokenizer, word, positions)]
        offset += len(segment.text)


def _words(text: str, identifier: str) -> list[tuple[int, int]]:
    """Ranges of the parts that ComfyUI tokenizes separately: it splits before each embedding identifier."""
    cuts = [0, *(m.start() for m in re.finditer(rf"(?<=\s){re.escape(identifier)}", text)), len(text)]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def _split_positions(word: str, positions: list[int], rest: str) -> tuple[list[int], CharRange]:
    """Positions of `rest`, the text after an embedding's name, whose whitespace ComfyUI rewrites; range of the name."""
    left: list[int] = []
    k = len(word)
    for char in reversed(rest):
        if not char.isspace():
            k -= 1
            while word[k] != char:
                k -= 1
        left.append(positions[min(k, len(positions) - 1)])
    name_end = k if rest.strip() else len(word.rstrip())
    return left[::-1], CharRange(positions[0], positions[name_end - 1] + 1)


def _tokenize_word(tokenizer: SDTokenizer, word: str, positions: list[int]) -> list[tuple[int, CharRange]]:
    encoded = tokenizer.tokenizer(word, return_offsets_mapping=True)
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    ids = encoded["input_ids"][tokenizer.tokens_start : end]
    offsets = encoded["offset_mapping"][tokenizer.tokens_start : end]
    return list(zip(ids, [CharRange(positions[a], positions[b - 1] + 1) for a, b in _tidy_offsets(word, offsets)]))


def _tidy_offsets(word: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets of a word's tokens without surrounding whitespace and without gaps.

    A bare word-start token gets the first character after it. Characters that the tokenizer's normalizer dropped go to
    the token before them, or to the first token at the start of the word.
    """
    tidy: list[tuple[int, int]] = []
    for start, end in offsets:
        while start < end and word[start].isspace():
            start += 1
        while start < end and word[end - 1].isspace():
            end -= 1
        if start == end:
            start = min(start, len(word) - 1)
            while start < len(word) - 1 and word[start].isspace():
                start += 1
            end = start + 1
        gap_start = max((e for _, e in tidy), default=0)
        gap = word[gap_start:start]
        if gap.strip() and tidy:
            tidy[-1] = (tidy[-1][0], gap_start + len(gap.rstrip()))
        elif gap.strip():
            start = gap_start + len(gap) - len(gap.lstrip())
        tidy.append((start, end))
    if tidy:
        last = max(e for _, e in tidy)
        if word[last:].strip():
            tidy[-1] = (tidy[-1][0], len(word.rstrip()))
    return tidy


def _search(text: str, phrase: str) -> list[CharRange]:
    normal, sources = _normalize(text)
    words = [re.escape(word) for word in _normalize(phrase)[0].split()]
    if not words:
        return []
    pattern = r"\s+".join(words)
    matches = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", normal)) or list(re.finditer(pattern, normal))
    return [CharRange(sources[m.start()].start, sources[m.end() - 1].end) for m in matches]


def _normalize(text: str) -> tuple[str, list[CharRange]]:
    """NFKC of each base character with its combining marks, and the source range of each resulting character."""
    out: list[str] = []
    sources: list[CharRange] = []
    start = 0
    for end in range(1, len(text) + 1):
        if end < len(text) and unicodedata.combining(text[end]):
            continue
        for char in unicodedata.normalize("NFKC", text[start:end]):
            out.append(char)
            sources.append(CharRange(start, end))
        start = end
    return "".join(out), sources


def _most_similar(text: str, phrase: str) -> str:
    words = text.split()
    count = len(phrase.split())
    lengths = {max(count - 1, 1), count, count + 1}
    runs = {" ".join(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)}
    by_case = {run.casefold(): run for run in sorted(runs)}
    best = difflib.get_close_matches(phrase.strip().casefold(), by_case, n=1, cutoff=0.0)
    if not best:
        return "the prompt is empty."
    return f"the most similar text is {by_case[best[0]]!r}. Copy the phrase exactly from the prompt."
