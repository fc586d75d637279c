"""Which tokens a phrase of the prompt became, on ComfyUI's own tokenization.

Character ranges are mapped through the tokenizers' offsets instead of tokenizing the phrase by itself, so context
(mid-sentence pieces, glued punctuation, weights, repeats) cannot hide it. Source of the idea of spans: SliderEdit,
section 'token spans'; its exact-run search is replaced.
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
    """Half-open range of characters."""

    start: int
    end: int


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and what every token of it stands for.

    visible: the text without weights and escapes, as the tokenizers see it.
    at: for each visible character its index in the raw prompt.
    tokens: per encoder (ComfyUI's attribute name: 't5xxl', 'clip_l') one entry per row of its output: the range of
        `visible` that became this token, or None for start, end and padding.
    """

    prompt: str
    visible: str
    at: tuple[int, ...]
    tokens: dict[str, tuple[CharRange | None, ...]]

    def visible_range(self, start: int, end: int) -> CharRange:
        """CharRange of `visible` that lies within characters start..end of the raw prompt."""
        return CharRange(bisect_left(self.at, start), bisect_left(self.at, end))

    def token_indices(self, encoder: str, span: CharRange) -> tuple[int, ...]:
        """Rows of `encoder` whose tokens overlap the visible `span`: they cover it, plus the rest of its end pieces.

        Raises SliderError when there are none.
        """
        rows = self.tokens[encoder]
        found = tuple(i for i, r in enumerate(rows) if r is not None and r.start < span.end and span.start < r.end)
        if not found:
            raise SliderError(
                f"{self.visible[span.start : span.end]!r} becomes no token of the text encoder; "
                "expected at least one letter, digit or sign it knows. Choose other words."
            )
        return found

    def padding(self, encoder: str) -> int:
        """Rows of `encoder` after the end token."""
        rows = self.tokens[encoder]
        last = max((i for i, r in enumerate(rows) if r is not None), default=-1)
        return max(len(rows) - last - 2, 0)


def tokenizers(clip: CLIP) -> dict[str, SDTokenizer]:
    """The tokenizers of a CLIP by ComfyUI's attribute name, such as 't5xxl'."""
    return {name: t for name, t in vars(clip.tokenizer).items() if isinstance(t, SDTokenizer)}


def tokenize(clip: CLIP, prompt: str, **options: Any) -> TokenizedPrompt:
    """Tokenize as `clip.tokenize(prompt, tokenizer_options=options)` does, keeping character positions.

    Raises SliderError when this ComfyUI splits the prompt differently than expected, rather than pick wrong tokens.
    """
    if lost := [char for char in prompt if "\ud800" <= char <= "\udfff"]:
        raise SliderError(f"The prompt holds {lost[0]!r}, which is half of a character. Type that place again.")
    options = {**clip.tokenizer_options, **options}
    segments = parse_prompt(prompt)
    visible = "".join(s.text for s in segments)
    at = tuple(i for s in segments for i in s.at)
    tokens = {
        name: _token_ranges(tokenizer, prompt, segments, options)
        for name, tokenizer in tokenizers(clip).items()
        if tokenizer.tokenizer.is_fast and not tokenizer.disable_weights
    }
    return TokenizedPrompt(prompt, visible, at, tokens)


def find_phrase(text: str, phrase: str, occurrence: int = 1) -> list[CharRange]:
    """Where `phrase` stands in the visible `text`: its occurrence-th place counted from 1, or all places for 0.

    Runs of white space match each other and unicode forms are equalised; letter case counts. Places at word
    boundaries win: only if there are none are places inside words found.
    Raises SliderError naming the closest words when it is absent, or how often it occurs when there are fewer.
    """
    if not phrase.strip():
        raise SliderError("The phrase is empty; expected some words of the prompt.")
    places = _search(text, phrase) or _search(text, "".join(s.text for s in parse_prompt(phrase)))
    if not places:
        raise SliderError(f"{phrase.strip()!r} is not in the prompt; {_closest(text, phrase)}")
    if occurrence == 0:
        return places
    if not 1 <= occurrence <= len(places):
        raise SliderError(
            f"{phrase.strip()!r} occurs {len(places)} time(s) in the prompt; occurrence {occurrence} does not exist. "
            f"Choose 1 to {len(places)}, or 0 for all."
        )
    return [places[occurrence - 1]]


def _token_ranges(
    tokenizer: SDTokenizer, prompt: str, segments: list[Segment], options: dict[str, Any]
) -> tuple[CharRange | None, ...]:
    ours = [(w, *token) for w, group in enumerate(_token_groups(tokenizer, segments), 1) for token in group]
    batches = tokenizer.tokenize_with_weights(prompt, return_word_ids=True, tokenizer_options=options)
    rows = [row for batch in batches for row in batch]
    theirs = [row for row in rows if row[2] != 0]
    same = len(ours) == len(theirs) and all(
        word == row[2] and weight == row[1] and (torch.is_tensor(row[0]) if token is None else token == row[0])
        for (word, token, weight, _), row in zip(ours, theirs)
    )
    if not same:
        raise SliderError(
            f"This version of ComfyUI splits the prompt into tokens in a way that is not known here ({prompt[:60]!r}). "
            "Update the pack, or leave embeddings and weights out of the prompt."
        )
    ranges = iter(ours)
    return tuple(next(ranges)[3] if row[2] != 0 else None for row in rows)


def _token_groups(
    tokenizer: SDTokenizer, segments: list[Segment]
) -> Iterator[list[tuple[int | None, float, CharRange]]]:
    """ComfyUI's groups of (token id or None for an embedding vector, weight, visible range), in its order."""
    offset = 0
    mark = tokenizer.embedding_identifier
    for segment in segments:
        for start, end in _words(segment.text, mark):
            word, places = segment.text[start:end], list(range(offset + start, offset + end))
            if word.startswith(mark) and tokenizer.embedding_directory is not None:
                vectors, _, rest = tokenizer._try_get_embedding(word[len(mark) :].strip("\n"))
                word, places, named = rest, *_split_places(word, places, rest)
                if vectors is not None:
                    count = 1 if vectors.ndim == 1 else vectors.shape[0]
                    yield [(None, segment.weight, named)] * count
                if rest == "":
                    continue
            yield [(token, segment.weight, r) for token, r in _pieces(tokenizer, word, places)]
        offset += len(segment.text)


def _words(text: str, mark: str) -> list[tuple[int, int]]:
    cuts = [0, *(m.start() for m in re.finditer(rf"(?<=\s){re.escape(mark)}", text)), len(text)]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def _split_places(word: str, places: list[int], rest: str) -> tuple[list[int], CharRange]:
    """Places of the text `rest` left over after an embedding's name (its spaces are remade), and the name's range."""
    left: list[int] = []
    k = len(word)
    for char in reversed(rest):
        if not char.isspace():
            k -= 1
            while word[k] != char:
                k -= 1
        left.append(places[min(k, len(places) - 1)])
    name_end = k if rest.strip() else len(word.rstrip())
    return left[::-1], CharRange(places[0], places[name_end - 1] + 1)


def _pieces(tokenizer: SDTokenizer, word: str, places: list[int]) -> list[tuple[int, CharRange]]:
    encoded = tokenizer.tokenizer(word, return_offsets_mapping=True)
    end = -1 if tokenizer.tokenizer_adds_end_token else None
    ids = encoded["input_ids"][tokenizer.tokens_start : end]
    offsets = encoded["offset_mapping"][tokenizer.tokens_start : end]
    return list(zip(ids, [CharRange(places[a], places[b - 1] + 1) for a, b in _tidy_offsets(word, offsets)]))


def _tidy_offsets(word: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets without surrounding spaces and without gaps.

    A bare word-start piece belongs to the first character after it; characters that the tokenizer's normaliser
    dropped belong to the piece before them (at the very start: to the first piece).
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
    plain, clusters = _normalise(text)
    wanted, _ = _normalise(phrase)
    words = [re.escape(word) for word in wanted.split()]
    if not words:
        return []
    pattern = r"\s+".join(words)
    found = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", plain)) or list(re.finditer(pattern, plain))
    return [CharRange(clusters[m.start()].start, clusters[m.end() - 1].end) for m in found]


def _normalise(text: str) -> tuple[str, list[CharRange]]:
    """NFKC per base character with its combining marks, and for each resulting character the source range."""
    out: list[str] = []
    source: list[CharRange] = []
    start = 0
    for end in range(1, len(text) + 1):
        if end < len(text) and unicodedata.combining(text[end]):
            continue
        for char in unicodedata.normalize("NFKC", text[start:end]):
            out.append(char)
            source.append(CharRange(start, end))
        start = end
    return "".join(out), source


def _closest(text: str, phrase: str) -> str:
    words = text.split()
    count = len(phrase.split())
    lengths = {max(count - 1, 1), count, count + 1}
    runs = {" ".join(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)}
    by_case = {run.casefold(): run for run in sorted(runs)}
    best = difflib.get_close_matches(phrase.strip().casefold(), by_case, n=1, cutoff=0.0)
    if not best:
        return "the prompt is empty."
    return f"closest: {by_case[best[0]]!r}. Copy the words exactly as they stand there."
