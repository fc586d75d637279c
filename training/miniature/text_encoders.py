"""Small text encoders for the world's instructions.

T5 learns that every token tells what its own instruction asks for, as a trained encoder's tokens would. CLIP-L keeps
its random weights: its pooled vector tells prompts apart, and the transformer learns not to rely on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comfy.text_encoders.flux import FluxTokenizer, T5XXLTokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from slider_core.text.instructions import SEPARATOR

from ..frozen_model import Text
from ..rng import generator
from .edits import MOST_AT_ONCE, Edit, edits
from .synthetic_scenes import COLOURS, TONES, scene
from .train_loop import learn

T5: dict[str, Any] = {"d_model": 64, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 3}
CLIP_L: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
}
ENCODER_OPTIONS = {"model_config": CLIP_L, "t5xxl_model_config": T5}
"""What ComfyUI's loader has to know of them."""
STEPS = 1500
_BATCH = 32
_ROWS = (24, 28, 32, 32, 48, 64, 256, 512)
_MOST_TOKENS = 2048
_MEANINGS = (
    *((f"{thing}_colour", colour) for thing in ("circle", "square") for colour in COLOURS.values()),
    *(("background", tone) for tone in TONES.values()),
    *((f"{thing}_size", factor) for thing in ("circle", "square") for factor in (1.5, 2 / 3)),
)
_NOTHING = len(_MEANINGS)


class T5Reader(torch.nn.Module):
    """T5 and what tells from its states what an instruction asks for."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.t5 = _t5()
            self.tells = torch.nn.Linear(T5["d_model"], _NOTHING + 1)
        self.tokenizer = T5XXLTokenizer().tokenizer

    def learn(self, folder: Path, steps: int = STEPS) -> None:
        optimiser = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.0)
        learn(folder, self, optimiser, self._loss, steps)

    def weights(self) -> dict[str, Tensor]:
        """By ComfyUI's names."""
        return {
            key: value.half() for key, value in self.t5.state_dict().items() if key != "encoder.embed_tokens.weight"
        }

    def _loss(self, step: int) -> Tensor:
        tokens, meanings = self.samples(step)
        said = self.tells(self.t5(input_ids=tokens).last_hidden_state)
        written = meanings != _NOTHING
        return cross_entropy(said[written], meanings[written]) + 0.1 * cross_entropy(said[~written], meanings[~written])

    def samples(self, step: int) -> tuple[Tensor, Tensor]:
        """Prompts as tokens and, for each token, what its instruction asks for: (batch, rows) both."""
        chance = generator("text", step)
        rows = _ROWS[int(torch.randint(len(_ROWS), (), generator=chance))]
        batch = min(_BATCH, _MOST_TOKENS // rows)
        tokens = torch.zeros(batch, rows, dtype=torch.long)
        meanings = torch.full((batch, rows), _NOTHING)
        for k in range(batch):
            count = 1 + int(torch.randint(MOST_AT_ONCE, (), generator=chance))
            read = [self._read(edit) for edit in edits(chance, scene(chance), count)]
            joint = (self._tokens(SEPARATOR), _NOTHING)
            parts = [part for one in read for part in (joint, one)][1:]
            ids = [token for part, _ in parts for token in part] + [self.tokenizer.eos_token_id]
            tells = [meaning for part, meaning in parts for _ in part]
            tokens[k, : min(len(ids), rows)] = torch.tensor(ids[:rows])
            meanings[k, : min(len(tells), rows)] = torch.tensor(tells[:rows])
        return tokens, meanings

    def _read(self, edit: Edit) -> tuple[list[int], int]:
        return self._tokens(edit.instruction), _MEANINGS.index((edit.attribute, edit.full))

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class TextEncoders:
    """Both encoders, for many prompts at once; what they say equals what ComfyUI's say."""

    def __init__(self, t5: Mapping[str, Tensor], clip_l: Mapping[str, Tensor]):
        self.t5 = _t5()
        self.t5.load_state_dict({key: value.float() for key, value in t5.items()}, strict=False)
        self.clip_l = _clip_l()
        self.clip_l.load_state_dict({key: value.float() for key, value in clip_l.items()}, strict=False)
        self.tokenizer = FluxTokenizer()
        self._known: dict[str, tuple[list[int], list[int]]] = {}

    @torch.no_grad()
    def encoded(self, prompts: Sequence[str], rows: int) -> Text:
        """The prompts padded to `rows`; longer ones are cut."""
        both = [self._tokens(prompt) for prompt in prompts]
        padded = [(ids + [0] * rows)[:rows] for ids, _ in both]
        states = self.t5(input_ids=torch.tensor(padded)).last_hidden_state
        pooled = self.clip_l.text_model(input_ids=torch.tensor([ids for _, ids in both])).pooler_output
        return Text(states, pooled)

    def _tokens(self, prompt: str) -> tuple[list[int], list[int]]:
        """Of T5 without padding, and of CLIP."""
        if prompt not in self._known:
            tokens = self.tokenizer.tokenize_with_weights(prompt)
            t5, clip_l = ([token for token, _ in tokens[name][0]] for name in ("t5xxl", "l"))
            self._known[prompt] = [token for token in t5 if token], clip_l
        return self._known[prompt]


def random_clip_l() -> dict[str, Tensor]:
    """Weights by ComfyUI's names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = _clip_l()
    return {key: value.half() for key, value in model.state_dict().items() if value.is_floating_point()}


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", vocab_size=32128, dropout_rate=0.0, **T5))


def _clip_l() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=CLIP_L["hidden_size"], **CLIP_L))
