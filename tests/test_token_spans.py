"""Token spans on ComfyUI's real tokenizers: golden case F, unusual prompts, and a property of random prompts."""

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


def token_indices(clip: Clip, prompt: str, phrase: str, occurrence: int = 1, encoder: str = "t5xxl") -> list[int]:
    tokenized = tokenize(clip, prompt)
    ranges = find_phrase(tokenized.visible, phrase, occurrence)
    return sorted({token for r in ranges for token in tokenized.token_indices(encoder, r)})


def decoded(clip: Clip, prompt: str, indices: list[int], encoder: str = "t5xxl") -> str:
    ids = [token[0] for batch in getattr(clip.tokenizer, encoder).tokenize_with_weights(prompt) for token in batch]
    return getattr(clip.tokenizer, encoder).tokenizer.decode([ids[i] for i in indices])


CORRECTED = {  # prompt, phrase -> token indices where the reference is wrong
    # it takes the first unknown token, which is the other emoji
    ("make it 😀 and 🚀 style", "🚀"): [5, 6],
}
SUPPORTED = {  # prompt, phrase -> text of its tokens where the reference fails
    ("change it (make it red) please", "make it red"): "make it red",
    ('"make it snow" and "make it rain"', "make it rain"): "make it rain",
    ("transform the caterpillar into a butterfly", "cat"): "cater",
    ("transform the caterpillar into a butterfly", "butter"): "butterfly",
    ("transform the caterpillar into a butterfly", "pillar"): "pillar",
}
ERRORS = {  # prompt, phrase -> message
    ("make her smile! Make him cry!", "make him cry"): "the most similar text is 'Make him cry!'",
    ("make the hair curly", "make the hair straight"): "the most similar text is 'make the hair'",
    ("make the hair curly", ""): "phrase is empty",
    ("make the hair curly", "   "): "phrase is empty",
}


@pytest.mark.parametrize("case", TOKENS["finder"], ids=lambda c: c["what"])
def test_golden_finder(case, clip):
    key = (case["prompt"], case["span"])
    prompt = escaped(case["prompt"])
    if key in ERRORS:
        with pytest.raises(SliderError, match=re.escape(ERRORS[key])):
            token_indices(clip, prompt, case["span"])
    elif case["result"] == "found":
        assert token_indices(clip, prompt, case["span"]) == CORRECTED.get(key, case["token_indices"])
    else:
        assert decoded(clip, prompt, token_indices(clip, prompt, case["span"])) == SUPPORTED[key]


def test_number_of_padding_tokens(clip):
    for prompt in ("", "a cat", "a cat!  ", "an (embedding:1.2) of <pad> things"):
        for options in ({}, {"t5xxl_min_length": 512}, {"t5xxl_min_length": 0}, {"t5xxl_min_padding": 3}):
            [ids] = clip.tokenizer.tokenize_with_weights(prompt, tokenizer_options=options)["t5xxl"]
            pads = [token for token, *_ in ids][::-1]
            assert tokenize(clip, prompt, **options).num_padding_tokens("t5xxl") == pads.index(1), (prompt, options)


@pytest.mark.parametrize("case", TOKENS["mask_and_scale"], ids=range(len(TOKENS["mask_and_scale"])))
def test_golden_mask_and_scale(case, clip):
    from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths

    if case["result"] != "ok":  # more than the reference's maximum of 512 tokens, which ComfyUI does not have
        assert token_indices(clip, case["prompt"], case["spans"][-1]) == [673, 674, 675, 676]
        return
    conditioning = [[torch.zeros(1, 512, 4), {}]]
    spans = [Span(text, tuple(token_indices(clip, case["prompt"], text))) for text in case["spans"]]
    values = {str(k): 1.0 - alpha for k, alpha in enumerate(case["alphas"])}
    [[_, options]] = set_strengths(attach_spans(conditioning, 512, spans), values)
    scale = options["model_conds"][keys.suppression("default")].cond[0]
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
def test_unusual_prompts(clip, prompt, phrase, t5, clip_l):
    assert decoded(clip, prompt, token_indices(clip, prompt, phrase)) == t5
    assert decoded(clip, prompt, token_indices(clip, prompt, phrase, encoder="clip_l"), "clip_l").strip() == clip_l


def test_occurrences(clip):
    prompt = "make the hat red and the hat blue and the hat green"
    occurrences = [token_indices(clip, prompt, "the hat", k) for k in (1, 2, 3)]
    assert occurrences == sorted(occurrences)
    assert len({tuple(tokens) for tokens in occurrences}) == 3
    assert token_indices(clip, prompt, "the hat", 0) == sorted(token for tokens in occurrences for token in tokens)
    with pytest.raises(SliderError, match="occurs 3 time"):
        token_indices(clip, prompt, "the hat", 4)


def test_long_prompts(clip):
    prompt = " and ".join(f"make object {k} red" for k in range(120))
    assert decoded(clip, prompt, token_indices(clip, prompt, "make object 119 red")) == "make object 119 red"
    indices = token_indices(clip, prompt, "make object 60 red", encoder="clip_l")
    assert min(indices) > 77
    assert decoded(clip, prompt, indices, "clip_l").strip() == "make object 6 0 red"


def test_embeddings(tmp_path):
    for name, size in (("four", 4096), ("eight", 768)):
        torch.save({"string_to_param": {"*": torch.zeros(3, size)}}, tmp_path / f"{name}.pt")
    clip = Clip(str(tmp_path))
    prompt = "a hat embedding:four, in red and embedding:missing a coat"
    tokenized = tokenize(clip, prompt)
    [char_range] = find_phrase(tokenized.visible, "in red")
    assert decoded(clip, prompt, list(tokenized.token_indices("t5xxl", char_range))) == "in red"
    [char_range] = find_phrase(tokenized.visible, "embedding:four")
    assert len(tokenized.token_indices("t5xxl", char_range)) == 3
    [char_range] = find_phrase(tokenized.visible, "a coat")
    assert decoded(clip, prompt, list(tokenized.token_indices("t5xxl", char_range))) == "a coat"


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
def test_tokens_are_those_that_overlap_the_span(clip, encoder, prompt, data):
    tokenized = tokenize(clip, prompt)
    text = tokenized.visible
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    ranges = tokenized.token_ranges[encoder]
    try:
        selected = tokenized.token_indices(encoder, tokenized.visible_range(0, 0)._replace(start=start, end=end))
    except SliderError:
        assert not text[start:end].strip()
        return
    covered = {c for token in selected for c in range(*ranges[token])}
    assert {c for c in range(start, end) if not text[c].isspace()} <= covered
    for token, r in enumerate(ranges):
        if r is not None and token not in selected:
            assert r.end <= start or end <= r.start
    for token in selected:
        assert ranges[token].start < end
        assert start < ranges[token].end
    order = [r for r in ranges if r is not None]
    assert order == sorted(order, key=lambda r: r.start)


@pytest.mark.parametrize(
    "prompt", ["make it red \x1f", "make it (red \x1d)", "\x1c", "red\x1e blue", "make \x1f (it:1.2) red"]
)
def test_control_characters_that_python_treats_as_spaces(clip, prompt):
    tokenized = tokenize(clip, prompt)
    if "red" in prompt:
        assert token_indices(clip, prompt, "red")
    assert set(tokenized.token_ranges) == {"t5xxl", "clip_l"}


def test_unpaired_surrogates(clip):
    with pytest.raises(SliderError, match="half of a character"):
        tokenize(clip, "make it \ud83d red")
