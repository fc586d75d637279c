"""Spans on ComfyUI's real tokenizers: golden case F, awkward prompts, and a property over random ones."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from comfy.text_encoders.flux import FluxTokenizer
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from slider_core import keys
from slider_core.errors import SliderError
from slider_core.text.token_spans import find_phrase, tokenize

TOKENS = json.loads((GOLDEN / "tokens.json").read_text())


class Clip(SimpleNamespace):
    """The tokenizing half of a FLUX CLIP: comfy.sd.CLIP without text encoder weights."""

    def __init__(self, embeddings: str | None = None):
        super().__init__(tokenizer=FluxTokenizer(embedding_directory=embeddings), tokenizer_options={})


@pytest.fixture(scope="session")
def clip() -> Clip:
    return Clip()


def escaped(prompt: str) -> str:
    return re.sub(r"([()])", r"\\\1", prompt)


def rows(clip: Clip, prompt: str, phrase: str, occurrence: int = 1, encoder: str = "t5xxl") -> list[int]:
    tokenized = tokenize(clip, prompt)
    places = find_phrase(tokenized.visible, phrase, occurrence)
    return sorted({row for place in places for row in tokenized.token_indices(encoder, place)})


def pieces(clip: Clip, prompt: str, indices: list[int], encoder: str = "t5xxl") -> str:
    ids = [row[0] for batch in getattr(clip.tokenizer, encoder).tokenize_with_weights(prompt) for row in batch]
    return getattr(clip.tokenizer, encoder).tokenizer.decode([ids[i] for i in indices])


OURS_IS_RIGHT = {
    # the reference takes the first unknown token, which is the other emoji
    ("make it 😀 and 🚀 style", "🚀"): [5, 6],
}
SOLVED = {
    ("change it (make it red) please", "make it red"): "make it red",
    ('"make it snow" and "make it rain"', "make it rain"): "make it rain",
    ("transform the caterpillar into a butterfly", "cat"): "cater",
    ("transform the caterpillar into a butterfly", "butter"): "butterfly",
    ("transform the caterpillar into a butterfly", "pillar"): "pillar",
}
CLEAR_ERROR = {
    ("make her smile! Make him cry!", "make him cry"): "the most similar text is 'Make him cry!'",
    ("make the hair curly", "make the hair straight"): "the most similar text is 'make the hair'",
    ("make the hair curly", ""): "phrase is empty",
    ("make the hair curly", "   "): "phrase is empty",
}


@pytest.mark.parametrize("case", TOKENS["finder"], ids=lambda c: c["what"])
def test_golden_finder(case, clip):
    key = (case["prompt"], case["span"])
    prompt = escaped(case["prompt"])
    if key in CLEAR_ERROR:
        with pytest.raises(SliderError, match=re.escape(CLEAR_ERROR[key])):
            rows(clip, prompt, case["span"])
    elif case["result"] == "found":
        assert rows(clip, prompt, case["span"]) == OURS_IS_RIGHT.get(key, case["token_indices"])
    else:
        assert pieces(clip, prompt, rows(clip, prompt, case["span"])) == SOLVED[key]


def test_padding_is_counted(clip):
    for prompt in ("", "a cat", "a cat!  ", "an (embedding:1.2) of <pad> things"):
        for options in ({}, {"t5xxl_min_length": 512}, {"t5xxl_min_length": 0}, {"t5xxl_min_padding": 3}):
            [ids] = clip.tokenizer.tokenize_with_weights(prompt, tokenizer_options=options)["t5xxl"]
            pads = [token for token, *_ in ids][::-1]
            assert tokenize(clip, prompt, **options).num_padding_tokens("t5xxl") == pads.index(1), (prompt, options)


@pytest.mark.parametrize("case", TOKENS["mask_and_scale"], ids=range(len(TOKENS["mask_and_scale"])))
def test_golden_mask_and_scale(case, clip):
    from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths

    if case["result"] != "ok":  # beyond the reference's 512 tokens; ComfyUI has no such end
        assert rows(clip, case["prompt"], case["spans"][-1]) == [673, 674, 675, 676]
        return
    conditioning = [[torch.zeros(1, 512, 4), {}]]
    spans = [Span(text, tuple(rows(clip, case["prompt"], text))) for text in case["spans"]]
    values = {str(k): 1.0 - alpha for k, alpha in enumerate(case["alphas"])}
    [[_, options]] = set_strengths(attach_spans(conditioning, 512, spans), values)
    scale = options["model_conds"][keys.scales("default")].cond[0]
    assert scale.nonzero().flatten().tolist() == case["masked_indices"]
    assert torch.allclose(scale[case["masked_indices"]], torch.tensor(case["scale_at_masked_fp32"]))


@pytest.mark.parametrize(
    ("prompt", "phrase", "t5", "clip_l"),
    [
        ("a (red:1.3) hat", "red hat", "red hat", "red hat"),
        ("a (red (shiny:0.4)) hat", "shiny", "shiny", "shiny"),
        ("(a hat", "hat", "hat", "hat"),
        ("a hat) and (more", "more", "more", "more"),
        (r"a \(red\) hat", "(red)", "(red)", "( red )"),
        ("smile,please", "please", "please", "please"),
        ("make it:blue", "blue", "blue", "blue"),
        ("ein Hut für Käthe", "für Käthe", "für Käthe", "für käthe"),
        ("make the ﬁne hair", "fine hair", "fine hair", "ﬁne hair"),
        ("scarred and red", "red", "red", "red"),
        ("a caterpillar hat", "pillar", "pillar", "caterpillar"),
        ("scarred", "red", "red", "red"),
        ("a zero\u200bwidth hat", "hat", "hat", "hat"),
    ],
)
def test_awkward_prompts(clip, prompt, phrase, t5, clip_l):
    assert pieces(clip, prompt, rows(clip, prompt, phrase)) == t5
    assert pieces(clip, prompt, rows(clip, prompt, phrase, encoder="clip_l"), "clip_l").strip() == clip_l


def test_occurrences(clip):
    prompt = "make the hat red and the hat blue and the hat green"
    each = [rows(clip, prompt, "the hat", k) for k in (1, 2, 3)]
    assert each == sorted(each)
    assert len({tuple(e) for e in each}) == 3
    assert rows(clip, prompt, "the hat", 0) == sorted(row for place in each for row in place)
    with pytest.raises(SliderError, match="occurs 3 time"):
        rows(clip, prompt, "the hat", 4)


def test_longer_than_the_padding(clip):
    prompt = " and ".join(f"make object {k} red" for k in range(120))
    assert pieces(clip, prompt, rows(clip, prompt, "make object 119 red")) == "make object 119 red"
    found = rows(clip, prompt, "make object 60 red", encoder="clip_l")
    assert min(found) > 77
    assert pieces(clip, prompt, found, "clip_l").strip() == "make object 6 0 red"


def test_embeddings(tmp_path):
    for name, size in (("four", 4096), ("eight", 768)):
        torch.save({"string_to_param": {"*": torch.zeros(3, size)}}, tmp_path / f"{name}.pt")
    clip = Clip(str(tmp_path))
    prompt = "a hat embedding:four, in red and embedding:missing a coat"
    tokenized = tokenize(clip, prompt)
    [place] = find_phrase(tokenized.visible, "in red")
    assert pieces(clip, prompt, list(tokenized.token_indices("t5xxl", place))) == "in red"
    [place] = find_phrase(tokenized.visible, "embedding:four")
    assert len(tokenized.token_indices("t5xxl", place)) == 3
    [place] = find_phrase(tokenized.visible, "a coat")
    assert pieces(clip, prompt, list(tokenized.token_indices("t5xxl", place))) == "a coat"


words = st.sampled_from(
    ["make", "her", "older", "hair", "caterpillar", "red", "café", "naïve", "🚀", "ﬁne", "3.5cm", "把头发", "don't",
     "x", "ultra-wide", "e\u0301lan", "AND", "BREAK", "½", "Straße", "…", "—", "\uff46ull"]
)  # fmt: skip
wrapped = st.one_of(
    words,
    words.map(lambda w: f"({w}:1.2)"),
    words.map(lambda w: f"(({w}))"),
    words.map(lambda w: f"\\({w}\\)"),
    words.map(lambda w: f"{w},"),
    words.map(lambda w: f'"{w}"'),
)
spaces = st.sampled_from([" ", "  ", "\n", "\t", ", ", ""])


@st.composite
def prompts(draw) -> str:
    return "".join(w + draw(spaces) for w in draw(st.lists(wrapped, min_size=1, max_size=9)))


@settings(max_examples=300, deadline=None)
@given(prompts(), st.data())
@pytest.mark.parametrize("encoder", ["t5xxl", "clip_l"])
def test_tokens_cover_the_span_and_nothing_beyond_its_end_pieces(clip, encoder, prompt, data):
    tokenized = tokenize(clip, prompt)
    text = tokenized.visible
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    ranges = tokenized.token_ranges[encoder]
    try:
        chosen = tokenized.token_indices(encoder, tokenized.visible_range(0, 0)._replace(start=start, end=end))
    except SliderError:
        assert not text[start:end].strip()
        return
    covered = {c for row in chosen for c in range(*ranges[row])}
    assert {c for c in range(start, end) if not text[c].isspace()} <= covered
    for row, r in enumerate(ranges):
        if r is not None and (row not in chosen):
            assert r.end <= start or end <= r.start
    for row in chosen:
        assert ranges[row].start < end
        assert start < ranges[row].end
    order = [r for r in ranges if r is not None]
    assert order == sorted(order, key=lambda r: r.start)


@pytest.mark.parametrize(
    "prompt", ["make it red \x1f", "make it (red \x1d)", "\x1c", "red\x1e blue", "make \x1f (it:1.2) red"]
)
def test_separators_that_python_takes_for_spaces(clip, prompt):
    tokenized = tokenize(clip, prompt)
    if "red" in prompt:
        assert rows(clip, prompt, "red")
    assert set(tokenized.token_ranges) == {"t5xxl", "clip_l"}


def test_half_a_character(clip):
    with pytest.raises(SliderError, match="half of a character"):
        tokenize(clip, "make it \ud83d red")
