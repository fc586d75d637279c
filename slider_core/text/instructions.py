"""Splitting text into a prompt and the character ranges of its instructions.

The page splits the same way, in web/slider_prompt/phrases.mjs. tests/data/instruction_splitter_cases.json holds the
cases on which both must agree.
"""

from __future__ import annotations

import re
import unicodedata

from ..errors import SliderError
from .token_spans import CharRange

SEPARATOR = " and "
"""Joins the instructions of a prompt, as in SliderEdit's training."""

_MARK = re.compile(r"\\?(\[\[|\]\])")


def join_lines(text: str) -> tuple[str, list[CharRange]]:
    """Join instructions, one per line, with SEPARATOR. Returns the prompt and each instruction's range in it.

    Lines without visible characters are skipped. Raises SliderError if no line is left.
    """
    lines = [line.strip() for line in text.splitlines() if any(unicodedata.category(c)[0] not in "CZ" for c in line)]
    if not lines:
        raise SliderError("The prompt is empty; expected one instruction per line, such as 'make her smile'.")
    ranges, start = [], 0
    for line in lines:
        ranges.append(CharRange(start, start + len(line)))
        start += len(line) + len(SEPARATOR)
    return SEPARATOR.join(lines), ranges


def remove_instruction(prompt: str, instruction: CharRange) -> str:
    """Remove the instruction at this range of the prompt, together with the SEPARATOR that joined it."""
    before, after = prompt[: instruction.start], prompt[instruction.end :]
    if after.startswith(SEPARATOR):
        return before + after[len(SEPARATOR) :]
    return before.removesuffix(SEPARATOR) + after


def read_marks(text: str) -> tuple[str, list[CharRange]]:
    """Read text with phrases in [[double brackets]]. Returns the prompt without marks, and each phrase's range in it.

    Marks can be nested; ranges are in the order of the opening marks. `\\[[` and `\\]]` are literal brackets.
    Raises SliderError for unbalanced or empty marks, and if nothing is marked.
    """
    prompt, position = "", 0
    ranges: list[CharRange] = []
    open_marks: list[int] = []
    for match in _MARK.finditer(text):
        prompt += text[position : match.start()]
        position = match.end()
        if match[0] == "[[":
            open_marks.append(len(ranges))
            ranges.append(CharRange(len(prompt), len(prompt)))
        elif match[0] == "]]":
            if not open_marks:
                raise SliderError(f"']]' after {prompt[-30:]!r} has no matching '[['; add '[[' before the phrase.")
            opened = open_marks.pop()
            ranges[opened] = CharRange(ranges[opened].start, len(prompt))
            if not prompt[ranges[opened].start :].strip():
                raise SliderError("'[[]]' marks no text; expected a phrase between the brackets.")
        else:
            prompt += match[1]
    prompt += text[position:]
    if open_marks:
        raise SliderError(f"'[[' before {prompt[ranges[open_marks[-1]].start :][:30]!r} is not closed; add ']]'.")
    if not ranges:
        raise SliderError("No phrase is marked; put [[double brackets]] around each phrase that gets a slider.")
    return prompt, ranges
