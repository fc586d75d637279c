"""Nodes that load inputs of the golden cases: text in place of text encoders' output, latents and noise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import comfy.latent_formats
import torch
from comfy.sd import CLIP
from comfy_api.latest import io
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parents[2] / "data" / "golden"


def _stored(key: str) -> torch.Tensor:
    for file in FOLDER.glob("stableflow*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if key in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(key)
    raise KeyError(key)


class _GoldenText:
    """A CLIP that encodes the prompt 'k' ('0', '1', ...) as text k of a golden batch of texts."""

    def __init__(self, clip: CLIP, text: str, pooled: str) -> None:
        self.tokenizer = clip.tokenizer
        self._text, self._pooled = _stored(text), _stored(pooled)

    def tokenize(self, prompt: str, **options: Any) -> int:
        return int(prompt)

    def encode_from_tokens_scheduled(self, k: int) -> list:
        prompt = slice(k, k + 1)
        return [[self._text[prompt], {"pooled_output": self._pooled[prompt]}]]


class TinyTestGoldenText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyTestGoldenText",
            category="tests",
            inputs=[io.Clip.Input("clip"), io.String.Input("text"), io.String.Input("pooled")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip: CLIP, text: str, pooled: str) -> io.NodeOutput:
        return io.NodeOutput(_GoldenText(clip, text, pooled))


class TinyTestGoldenLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyTestGoldenLatent",
            category="tests",
            inputs=[io.String.Input("key")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, key: str) -> io.NodeOutput:
        return io.NodeOutput({"samples": comfy.latent_formats.Flux().process_out(_stored(key))})


class _GoldenNoise:
    seed = 0

    def __init__(self, noise: torch.Tensor) -> None:
        self._noise = noise

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        num_images = latent["samples"].shape[0]
        return copy.copy(self._noise).repeat(num_images // len(self._noise), 1, 1, 1)


class TinyTestGoldenNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyTestGoldenNoise",
            category="tests",
            inputs=[io.String.Input("key"), io.Float.Input("sigma", default=1.0)],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls, key: str, sigma: float) -> io.NodeOutput:
        return io.NodeOutput(_GoldenNoise(_stored(key) / sigma))


GOLDEN_NODES: list[type[io.ComfyNode]] = [TinyTestGoldenText, TinyTestGoldenLatent, TinyTestGoldenNoise]
