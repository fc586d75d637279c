"""One prompt out of several sub-instructions, and where each of them stands in it."""

from __future__ import annotations

import re
import unicodedata

from ..errors import SliderError
from .token_spans import CharRange

SEPARATOR = " and "
"""How SliderEdit joins instructions in training (section 'SliderEdit')."""

_MARK = re.compile(r"\\?(\[\[|\]\])")


def join_lines(text: str) -> tuple[str, list[CharRange]]:
    """One sub-instruction per line, joined with ' and '. Returns the prompt and each line's raw character range.

    Lines without anything visible are skipped. Raises SliderError when nothing is left.
    """
    lines = [line.strip() for line in text.splitlines() if any(unicodedata.category(c)[0] not in "CZ" for c in line)]
    if not lines:
        raise SliderError("The prompt is empty; expected one sub-instruction per line, such as 'make her smile'.")
    spans, start = [], 0
    for line in lines:
        spans.append(CharRange(start, start + len(line)))
        start += len(line) + len(SEPARATOR)
    return SEPARATOR.join(lines), spans


def remove_instruction(prompt: str, part: CharRange) -> str:
    """The prompt without a sub-instruction, given its raw characters, and without the ' and ' that joined it."""
    before, after = prompt[: part.start], prompt[part.end :]
    if after.startswith(SEPARATOR):
        return before + after[len(SEPARATOR) :]
    return before.removesuffix(SEPARATOR) + after


def read_marks(text: str) -> tuple[str, list[CharRange]]:
    """A free prompt in which [[double brackets]] mark the phrases. Returns the prompt without marks and the ranges.

    Marks may be nested; ranges come in the order in which the marks open. `\\[[` and `\\]]` are literal.
    Raises SliderError when a mark is not closed, not opened or empty, or when there is none.
    """
    prompt, position = "", 0
    spans: list[CharRange] = []
    still_open: list[int] = []
    for match in _MARK.finditer(text):
        prompt += text[position : match.start()]
        position = match.end()
        if match[0] == "[[":
            still_open.append(len(spans))
            spans.append(CharRange(len(prompt), len(prompt)))
        elif match[0] == "]]":
            if not still_open:
                raise SliderError(f"']]' after {prompt[-30:]!r} closes nothing; expected '[[' before the phrase.")
            opened = still_open.pop()
            spans[opened] = CharRange(spans[opened].start, len(prompt))
            if not prompt[spans[opened].start :].strip():
                raise SliderError("'[[]]' marks nothing; expected words between the brackets.")
        else:
            prompt += match[1]
    prompt += text[position:]
    if still_open:
        raise SliderError(f"'[[' before {prompt[spans[still_open[-1]].start :][:30]!r} is not closed; add ']]'.")
    if not spans:
        raise SliderError("No phrase is marked; put [[double brackets]] around the words that get a slider.")
    return prompt, spans
