"""Attention of one image point, split into text and image tokens (Stable Flow, arXiv 2411.14430, figure 6).

For the query token q of the point, with keys K of all tokens and head dimension d,

    a = mean over heads, and over the model calls of a sampling, of softmax(q K^T / sqrt(d))

The sum of a over the text tokens is the block's text attention; a over the image tokens is its image map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..errors import SliderError
from ..families import family_of
from ..families.network import diffusion_model_of
from ..patching.forward_patches import AttentionPatch, ForwardContext, ModelPatch, Phase, add_patch
from ..sampling.sampling_settings import SamplingSettings
from ..types import Conditioning, OnStep


@dataclass
class AttentionMaps:
    """Attention of one point, by block index.

    text: attention to all text tokens, 0 to 1. image: attention to each image token, (grid height, grid width).
    The two need not sum to 1; the rest is attention to reference latents.
    num_calls: number of model calls that are added up.
    """

    text: dict[int, float] = field(default_factory=dict)
    image: dict[int, torch.Tensor] = field(default_factory=dict)
    num_calls: int = 0

    def mean_text(self, block_indices: Sequence[int]) -> float:
        """Attention to the text, averaged over blocks."""
        return sum(self.text[index] for index in block_indices) / len(block_indices)

    def mean_image(self, block_indices: Sequence[int]) -> torch.Tensor:
        """Attention to each image token, averaged over blocks: (grid height, grid width)."""
        return torch.stack([self.image[index] for index in block_indices]).mean(0)

    def mean_over_calls(self) -> AttentionMaps:
        """The sums over model calls, divided by their number."""
        text = {index: total / self.num_calls for index, total in self.text.items()}
        image = {index: total / self.num_calls for index, total in self.image.items()}
        return AttentionMaps(text, image, 1)


def measure_attention(
    model: ModelPatcher,
    conditioning: Conditioning,
    latent: torch.Tensor,
    noise: torch.Tensor,
    settings: SamplingSettings,
    batch_index: int,
    point: tuple[float, float],
    on_step: OnStep | None = None,
) -> tuple[AttentionMaps, torch.Tensor]:
    """Sample at cfg 1 and record the attention of one point. Returns its maps and the sampled latents.

    latent, noise: (batch, channels, height, width). batch_index: the image to look at. point: (x, y), each 0 to 1.
    Raises SliderError for an batch_index outside the batch, and for a compiled model, whose attention is inaccessible.
    """
    if not 0 <= batch_index < latent.shape[0]:
        raise SliderError(
            f"batch_index is {batch_index}, but the batch has {latent.shape[0]} image(s); expected 0 to "
            f"{latent.shape[0] - 1}."
        )
    probe = _AttentionProbe(model, batch_index, point)
    samples = settings.sample(add_patch(model, probe), conditioning, latent, noise, on_step)
    return probe.maps.mean_over_calls(), samples


class _AttentionProbe(ModelPatch):
    """Adds up the attention of one point over all model calls; does not change the model's output."""

    phase = Phase.OBSERVE

    def __init__(self, model: ModelPatcher, batch_index: int, point: tuple[float, float]):
        self.family, self.model = family_of(model), diffusion_model_of(model.model)
        self.batch_index, self.point = batch_index, point
        self.maps = AttentionMaps()

    def attention_patches(self, context: ForwardContext) -> Sequence[AttentionPatch]:
        height, width = self.family.image_grid(context.latent_shape)
        column, row = (min(int(position * size), size - 1) for position, size in zip(self.point, (width, height)))
        num_text = context.num_text_tokens
        query = num_text + row * width + column
        self.maps.num_calls += 1

        def patch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
            image, positions = slice(self.batch_index, self.batch_index + 1), inputs["pe"]
            positions = positions if positions.shape[0] == 1 else positions[image]
            queries, keys = self.family.apply_rope(q[image], k[image], positions)
            scores = queries[0, :, query : query + 1].float() @ keys[0].float().transpose(-1, -2)
            attention = (scores / keys.shape[-1] ** 0.5).softmax(-1).mean((0, 1)).cpu()
            index = self.family.block_index_of(inputs["extra_options"], self.model)
            text, image_map = attention[:num_text], attention[num_text : num_text + height * width]
            self.maps.text[index] = self.maps.text.get(index, 0.0) + float(text.sum())
            self.maps.image[index] = self.maps.image.get(index, 0.0) + image_map.reshape(height, width)
            return {}

        return (patch,)
