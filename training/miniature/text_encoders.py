"""Small text encoders for the instructions of synthetic scenes.

T5 is trained to encode in every token what the token's instruction asks for. CLIP-L keeps its random weights: its
pooled vector differs between prompts, but the transformer is trained not to rely on it.
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
from .edits import MAX_EDITS, Edit, random_edits
from .synthetic_scenes import COLORS, TONES, random_scene
from .train_loop import train_module

T5: dict[str, Any] = {"d_model": 64, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 3}
CLIP_L: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
}
ENCODER_OPTIONS = {"model_config": CLIP_L, "t5xxl_model_config": T5}
"""Options of ComfyUI's text encoder loader for these sizes."""
STEPS = 1500
_BATCH = 32
_LENGTHS = (24, 28, 32, 32, 48, 64, 256, 512)
_MAX_TOKENS = 2048
_CLASSES = (
    *((f"{name}_color", color) for name in ("circle", "square") for color in COLORS.values()),
    *(("background", tone) for tone in TONES.values()),
    *((f"{name}_size", factor) for name in ("circle", "square") for factor in (1.5, 2 / 3)),
)
"""(attribute, value at strength 1) of every edit."""
_NO_CLASS = len(_CLASSES)


class T5TokenClassifier(torch.nn.Module):
    """T5 with a linear classifier that predicts, for each token, which edit its instruction asks for."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.t5 = _t5()
            self.classifier = torch.nn.Linear(T5["d_model"], _NO_CLASS + 1)
        self.tokenizer = T5XXLTokenizer().tokenizer

    def fit(self, folder: Path, steps: int = STEPS) -> None:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.0)
        train_module(folder, self, optimizer, self._loss, steps)

    def weights(self) -> dict[str, Tensor]:
        """T5's weights in float16, with ComfyUI's names."""
        return {
            key: value.half() for key, value in self.t5.state_dict().items() if key != "encoder.embed_tokens.weight"
        }

    def _loss(self, step: int) -> Tensor:
        tokens, labels = self.samples(step)
        logits = self.classifier(self.t5(input_ids=tokens).last_hidden_state)
        labeled = labels != _NO_CLASS
        return cross_entropy(logits[labeled], labels[labeled]) + 0.1 * cross_entropy(logits[~labeled], labels[~labeled])

    def samples(self, step: int) -> tuple[Tensor, Tensor]:
        """Token ids of prompts, and the class of each token's instruction: both (batch, tokens)."""
        rng = generator("text", step)
        length = _LENGTHS[int(torch.randint(len(_LENGTHS), (), generator=rng))]
        batch_size = min(_BATCH, _MAX_TOKENS // length)
        tokens = torch.zeros(batch_size, length, dtype=torch.long)
        labels = torch.full((batch_size, length), _NO_CLASS)
        for k in range(batch_size):
            count = 1 + int(torch.randint(MAX_EDITS, (), generator=rng))
            phrases = [self._labeled(edit) for edit in random_edits(rng, random_scene(rng), count)]
            separator = (self._tokenize(SEPARATOR), _NO_CLASS)
            segments = [segment for phrase in phrases for segment in (separator, phrase)][1:]
            token_ids = [token for ids, _ in segments for token in ids] + [self.tokenizer.eos_token_id]
            token_labels = [label for ids, label in segments for _ in ids]
            tokens[k, : min(len(token_ids), length)] = torch.tensor(token_ids[:length])
            labels[k, : min(len(token_labels), length)] = torch.tensor(token_labels[:length])
        return tokens, labels

    def _labeled(self, edit: Edit) -> tuple[list[int], int]:
        """The token ids of an instruction and its class."""
        return self._tokenize(edit.instruction), _CLASSES.index((edit.attribute, edit.full))

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class TextEncoders:
    """T5 and CLIP-L for batches of prompts. The results equal those of ComfyUI's encoders."""

    def __init__(self, t5: Mapping[str, Tensor], clip_l: Mapping[str, Tensor]):
        self.t5 = _t5()
        self.t5.load_state_dict({key: value.float() for key, value in t5.items()}, strict=False)
        self.clip_l = _clip_l()
        self.clip_l.load_state_dict({key: value.float() for key, value in clip_l.items()}, strict=False)
        self.tokenizer = FluxTokenizer()
        self._token_ids: dict[str, tuple[list[int], list[int]]] = {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int) -> Text:
        """Encode the prompts, padded or truncated to `length` T5 tokens."""
        token_ids = [self._tokenize(prompt) for prompt in prompts]
        padded = [(t5 + [0] * length)[:length] for t5, _ in token_ids]
        states = self.t5(input_ids=torch.tensor(padded)).last_hidden_state
        pooled = self.clip_l.text_model(input_ids=torch.tensor([clip_l for _, clip_l in token_ids])).pooler_output
        return Text(states, pooled)

    def _tokenize(self, prompt: str) -> tuple[list[int], list[int]]:
        """The token ids of T5, without padding, and of CLIP-L; cached."""
        if prompt not in self._token_ids:
            tokens = self.tokenizer.tokenize_with_weights(prompt)
            t5, clip_l = ([token for token, _ in tokens[name][0]] for name in ("t5xxl", "l"))
            self._token_ids[prompt] = [token for token in t5 if token], clip_l
        return self._token_ids[prompt]


def random_clip_l() -> dict[str, Tensor]:
    """Random CLIP-L weights in float16, with ComfyUI's names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = _clip_l()
    return {key: value.half() for key, value in model.state_dict().items() if value.is_floating_point()}


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", vocab_size=32128, dropout_rate=0.0, **T5))


def _clip_l() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=CLIP_L["hidden_size"], **CLIP_L))
