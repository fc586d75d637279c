"""Splitting text into instructions, parsing prompts and lists of strengths, and the errors for invalid ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slider_core import keys
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.errors import SliderError
from slider_core.strength import batch_size, suppression, validate_strengths
from slider_core.sweep import linspace, parse_strengths, repeat_latent
from slider_core.text.encode import SPLITTERS
from slider_core.text.instructions import read_marks
from slider_core.text.prompt_syntax import parse_prompt

SPLITTER_CASES = json.loads((Path(__file__).parent / "data/instruction_splitter_cases.json").read_text())
"""text, mode -> prompt, character ranges in it, and the visible phrases; the prompt is null if the text is invalid."""


def marked(text: str) -> tuple[str, list[str]]:
    prompt, ranges = read_marks(text)
    return prompt, [prompt[a:b] for a, b in ranges]


@pytest.mark.parametrize("case", SPLITTER_CASES, ids=lambda case: repr(case["text"]))
def test_splitter(case):
    if case["prompt"] is None:
        with pytest.raises(SliderError):
            SPLITTERS[case["mode"]](case["text"])
        return
    prompt, ranges = SPLITTERS[case["mode"]](case["text"])
    assert (prompt, [list(r) for r in ranges]) == (case["prompt"], case["ranges"])
    visible = ["".join(segment.text for segment in parse_prompt(prompt[a:b])).strip() for a, b in ranges]
    assert visible == case["phrases"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "No phrase"),
        ("[[a", "not closed"),
        ("a]]", "no matching"),
        ("[[ ]]", "marks no text"),
        ("", "No phrase"),
    ],
)
def test_invalid_marks(text, message):
    with pytest.raises(SliderError, match=message):
        read_marks(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text("ab c(:1)", min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_marked_phrases_round_trip(phrases):
    prompt, read_phrases = marked(" ; ".join(f"[[{phrase}]]" for phrase in phrases))
    assert read_phrases == phrases
    assert prompt == " ; ".join(phrases)


@given(st.text("ab():1.\\ ", max_size=30))
def test_prompts_are_parsed_as_in_comfyui(prompt):
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    segments = parse_prompt(prompt)
    expected = [(unescape_important(text), weight) for text, weight in token_weights(escape_important(prompt), 1.0)]
    assert [(s.text, s.weight) for s in segments] == expected
    for segment in segments:
        assert [
            prompt[i + (prompt[i] == "\\" and c != "\\")] for i, c in zip(segment.char_indices, segment.text)
        ] == list(segment.text)


@pytest.mark.parametrize("value", [0.5, 1, (0.0, 1.5), [2], torch.tensor([0.5, 1.0]), torch.tensor(0.25)])
def test_valid_strengths(value):
    assert all(isinstance(v, float) for v in validate_strengths(value, "s"))


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, 1e300, -101, 10**400, [0.0, math.nan], "0.5", None, True, [], [[0.5]], {}, torch.ones(2, 2)],
)
def test_invalid_strengths(value):
    with pytest.raises(SliderError, match=r"^strength_3 is"):
        validate_strengths(value, "strength_3")


def test_strength_lists():
    assert batch_size({"a": (1.0,), "b": (0.0, 1.0)}) == 2
    with pytest.raises(SliderError, match=r"a has 3, b has 2"):
        batch_size({"a": (1.0,) * 3, "b": (0.0, 1.0)})
    assert linspace(0, 1.5, 4) == (0.0, 0.5, 1.0, 1.5)
    assert linspace(0.3, 0.9, 1) == (0.3,)
    assert 1.0 in linspace(0.0, 1.5, 16)
    assert parse_strengths("0,0.5;1\n-2") == (0.0, 0.5, 1.0, -2.0)
    for invalid, message in {
        "": "empty list",
        "0, half": "'half' is not a number",
        "nan": "is nan; expected a number from",
    }.items():
        with pytest.raises(SliderError, match=message):
            parse_strengths(invalid)
    assert torch.equal(suppression((0.3, 1.0), 2), torch.tensor([0.7, 0.0]))


def test_suppressions_of_overlapping_spans_multiply():
    spans = [Span("a", (0, 1)), Span("b", (1, 2))]
    [[_, options]] = set_strengths(attach_spans([[torch.zeros(1, 4, 8), {}]], 4, spans), {"x": 0.25, "y": 1.5})
    assert options["model_conds"][keys.suppression("default")].cond.tolist() == [[0.75, -0.375, -0.5, 0.0]]


def test_strength_lists_for_equal_phrases():
    spans = [Span("red", (0,)), Span("red", (2,))]
    [[_, options]] = set_strengths(attach_spans([[torch.zeros(1, 3, 8), {}]], 3, spans), {"x": (0.0, 0.5), "y": 1.0})
    assert options["model_conds"][keys.suppression("default")].cond.tolist() == [[1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]


def test_later_strengths_of_a_channel_replace_earlier_ones():
    plain = attach_spans([[torch.zeros(1, 2, 8), {}]], 2, [Span("a", (0,)), Span("b", (1,))])
    first = set_strengths(set_strengths(plain, {"x": 0.2, "y": 0.3}), {"x": 0.2, "y": 1.0}, "other")
    second = set_strengths(first, {"x": (0.5, 0.75), "y": 1.0})
    conds = second[0][1]["model_conds"]
    assert conds[keys.suppression("default")].cond.tolist() == [[0.5, 0.0], [0.25, 0.0]]
    assert conds[keys.suppression("other")].cond[0].tolist() == pytest.approx([0.8, 0.0])
    assert keys.suppression("default") not in set_strengths(second, {"x": 1.0, "y": 1.0})[0][1]["model_conds"]


def test_set_strengths_does_not_modify_its_input():
    plain = attach_spans([[torch.zeros(1, 4, 8), {"model_conds": {"other": 1}}]], 4, [Span("a", (0,))])
    first, second = (set_strengths(plain, {"x": v}) for v in (0.2, 0.8))
    assert plain[0][1]["model_conds"] == {"other": 1}
    assert first[0][1]["model_conds"][keys.suppression("default")].cond[0, 0] == pytest.approx(0.8)
    assert second[0][1]["model_conds"][keys.suppression("default")].cond[0, 0] == pytest.approx(0.2)
    assert second[0][1]["model_conds"]["other"] == 1


def test_repeat_latent():
    latent = {"samples": torch.ones(1, 16, 4, 4), "noise_mask": torch.ones(1, 4, 4)}
    swept = repeat_latent(latent, 3)
    assert swept["samples"].shape == (3, 16, 4, 4)
    assert swept["batch_index"] == [0, 0, 0]
    assert repeat_latent({**latent, "batch_index": [5]}, 2)["batch_index"] == [5, 5]
    with pytest.raises(SliderError, match="2 images"):
        repeat_latent({"samples": torch.ones(2, 16, 4, 4)}, 3)
