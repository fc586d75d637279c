"""How the attention of one point of a picture is shared among text and image tokens (Stable Flow, figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

from ..errors import SliderError
from ..families import family_of
from ..families.network import diffusion_model_of
from ..patching.forward_patches import AttentionPatch, ForwardContext, ModelPatch, Phase, add_patch
from ..types import Conditioning, OnStep


@dataclass
class PointAttention:
    """Mean over heads and model calls, per layer counted as in the paper.

    text: share that goes to text tokens. maps: (rows, columns) of shares that go to the picture's own tokens. What is
    missing to 1 goes to reference latents.
    """

    text: dict[int, float] = field(default_factory=dict)
    maps: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: int = 0

    def share_of_text(self, layers: Sequence[int]) -> float:
        return sum(self.text[layer] for layer in layers) / len(layers)

    def share_of_image(self, layers: Sequence[int]) -> float:
        return float(self.map_of(layers).sum())

    def map_of(self, layers: Sequence[int]) -> torch.Tensor:
        """Mean of the layers' maps."""
        return torch.stack([self.maps[layer] for layer in layers]).mean(0)


def measure_attention(
    model: ModelPatcher,
    conditioning: Conditioning,
    latent: torch.Tensor,
    noise: torch.Tensor,
    seed: int,
    steps: int,
    picture: int,
    point: tuple[float, float],
    on_step: OnStep | None = None,
) -> tuple[PointAttention, torch.Tensor]:
    """Sample as KSampler does (cfg 1, euler, simple) and watch one point; its attention, and the samples.

    latent, noise: (batch, channels, height, width). picture: of the batch, from 0. point: (across, down), each 0 to 1.
    Raises SliderError for a picture that is not in the batch and for a compiled model, whose attention is hidden.
    """
    if not 0 <= picture < latent.shape[0]:
        raise SliderError(
            f"There is no picture {picture} in a batch of {latent.shape[0]}; expected 0 to {latent.shape[0] - 1}."
        )
    watch = _Watch(model, picture, point)
    watched = add_patch(model, watch)
    inputs = (noise, steps, 1.0, "euler", "simple", conditioning, conditioning, latent)
    samples = comfy.sample.sample(watched, *inputs, callback=on_step, disable_pbar=True, seed=seed)
    seen = watch.seen
    seen.text = {layer: share / seen.calls for layer, share in seen.text.items()}
    seen.maps = {layer: shares / seen.calls for layer, shares in seen.maps.items()}
    return seen, samples


class _Watch(ModelPatch):
    """Operation: sums up the attention of one point over all calls; changes nothing."""

    phase = Phase.OBSERVE

    def __init__(self, model: ModelPatcher, picture: int, point: tuple[float, float]):
        self.family, self.model = family_of(model), diffusion_model_of(model.model)
        self.picture, self.point = picture, point
        self.seen = PointAttention()

    def attention_patches(self, context: ForwardContext) -> Sequence[AttentionPatch]:
        rows, columns = self.family.image_grid(context.latent_shape)
        row, column = (min(int(place * size), size - 1) for place, size in zip(reversed(self.point), (rows, columns)))
        first, query = context.num_text_tokens, context.num_text_tokens + row * columns + column
        self.seen.calls += 1

        def patch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
            one, positions = slice(self.picture, self.picture + 1), inputs["pe"]
            positions = positions if positions.shape[0] == 1 else positions[one]
            queries, keys = self.family.apply_rope(q[one], k[one], positions)
            scores = queries[0, :, query : query + 1].float() @ keys[0].float().transpose(-1, -2)
            shares = (scores / keys.shape[-1] ** 0.5).softmax(-1).mean((0, 1)).cpu()
            layer = self.family.block_index_of(inputs["extra_options"], self.model)
            of_picture = shares[first : first + rows * columns].reshape(rows, columns)
            self.seen.text[layer] = self.seen.text.get(layer, 0.0) + float(shares[:first].sum())
            self.seen.maps[layer] = self.seen.maps.get(layer, torch.zeros(rows, columns)) + of_picture
            return {}

        return (patch,)
