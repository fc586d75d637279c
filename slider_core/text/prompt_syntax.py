"""ComfyUI's prompt syntax, `(text:1.2)` weights and `\\(` escapes, with the position of every character.

Follows comfy.sd1_clip.token_weights character by character; token_spans checks that both give the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

Char = tuple[str, int]
"""A character, or an escaped parenthesis with its backslash, and its index in the raw prompt."""


@dataclass(frozen=True)
class Segment:
    """A run of text with one weight, as passed to a tokenizer.

    text: without parentheses and weights, escapes resolved.
    char_indices: index in the raw prompt of each character of `text`.
    weight: factor that ComfyUI applies to its tokens; 1 if no parentheses surround it.
    """

    text: str
    char_indices: tuple[int, ...]
    weight: float


def parse_prompt(prompt: str) -> list[Segment]:
    """Split a prompt into segments of equal weight, in order."""
    runs = _weighted_runs(_read_escapes(prompt), 1.0)
    return [Segment("".join(c[-1] for c, _ in run), tuple(i for _, i in run), weight) for run, weight in runs]


def _read_escapes(prompt: str) -> list[Char]:
    chars, i = [], 0
    while i < len(prompt):
        width = 2 if prompt[i : i + 2] in ("\\(", "\\)") else 1
        chars.append((prompt[i : i + width], i))
        i += width
    return chars


def _weighted_runs(chars: list[Char], weight: float) -> list[tuple[list[Char], float]]:
    runs = []
    for group in _bracket_groups(chars):
        if len(group) >= 2 and group[0][0] == "(" and group[-1][0] == ")":
            inner, inner_weight = _read_weight(group[1:-1], weight * 1.1)
            runs += _weighted_runs(inner, inner_weight)
        else:
            runs.append((group, weight))
    return runs


def _bracket_groups(chars: list[Char]) -> list[list[Char]]:
    groups: list[list[Char]] = []
    current: list[Char] = []
    depth = 0
    for char in chars:
        if char[0] == "(":
            if depth == 0 and current:
                groups.append(current)
                current = []
            depth += 1
        elif char[0] == ")":
            depth -= 1
        current.append(char)
        if char[0] == ")" and depth == 0:
            groups.append(current)
            current = []
    if current:
        groups.append(current)
    return groups


def _read_weight(inner: list[Char], default: float) -> tuple[list[Char], float]:
    colon = max((k for k, (c, _) in enumerate(inner) if c == ":"), default=0)
    if colon == 0:
        return inner, default
    try:
        return inner[:colon], float("".join(c for c, _ in inner[colon + 1 :]))
    except ValueError:
        return inner, default
