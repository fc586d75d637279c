"""The miniature edit model: the architecture of FLUX.1 Kontext, trained from scratch on edits of synthetic scenes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from slider_core.text.instructions import SEPARATOR

from ..frozen_model import FrozenModel, Text
from ..objectives import NEUTRAL_PROMPT
from ..rng import generator
from .latent_bank import LatentSamples
from .text_encoders import CLIP_L, T5, TextEncoders
from .train_loop import train_module

FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": CLIP_L["hidden_size"],
    "context_in_dim": T5["d_model"],
    "hidden_size": 128,
    "num_heads": 1,
    "depth": 3,
    "depth_single_blocks": 4,
    "mlp_ratio": 4.0,
    "axes_dim": [16, 56, 56],
    "txt_ids_dims": [],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
STEPS = 9000
_BATCH = 32
_LENGTHS = {20: 0.6, 24: 0.25, 32: 0.08, 48: 0.04, 96: 0.02, 256: 0.01}
"""Padded text length -> probability. All lengths must work; short ones are cheapest to train."""
_NO_EDITS = ((), NEUTRAL_PROMPT)
_OBJECT_WEIGHT = 4.0
_SHIFT = 3.0
"""Timestep shift: sigma = shift u / (1 + (shift - 1) u). High noise levels decide what the edit does."""


def random_model() -> FrozenModel:
    """The model with random weights. Its blocks start as the identity, and it predicts its input as the velocity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flux = comfy.ldm.flux.model.Flux(
            **FLUX, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
        )
        weights = {name: _initial_weight(name, value) for name, value in flux.state_dict().items()}
    model = FrozenModel(
        comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32}),
        gradient_checkpointing=False,
    )
    model.network.requires_grad_(True)
    return model


def _initial_weight(name: str, value: Tensor) -> Tensor:
    if name in ("img_in.weight", "final_layer.linear.weight"):
        return torch.eye(*value.shape)
    if "norm" in name:
        return torch.ones(value.shape)
    if name.endswith("bias") or "_mod.lin" in name or "modulation" in name:
        return torch.zeros(value.shape)
    return torch.randn(value.shape) / math.sqrt(value.shape[1])


class TransformerTraining:
    """Flow matching on edits at strength 1; the squared error of the velocity is weighted by sigma.

    Without that weight, low noise levels would dominate the loss: there small errors of the image are large errors of
    the velocity.
    """

    def __init__(self, model: FrozenModel, encoders: TextEncoders, samples: LatentSamples):
        self.model, self.encoders, self.samples = model, encoders, samples

    def fit(self, folder: Path, steps: int = STEPS) -> None:
        with self.model.patched({}):
            train_module(folder, self.model.network, _build_optimizer(self.model.network), self.loss, steps)

    def loss(self, step: int) -> Tensor:
        rng = generator("transformer", step)
        chosen = torch.randint(len(self.samples.instructions), (_BATCH,), generator=rng)
        sources, targets = self.samples.sources[chosen].float(), self.samples.targets[chosen].float()
        prompts = [self.samples.instructions[k] for k in chosen.tolist()]
        length = list(_LENGTHS)[int(torch.multinomial(torch.tensor(list(_LENGTHS.values())), 1, generator=rng))]
        if torch.rand((), generator=rng) < 0.5:
            prompts[0], targets[0] = _NO_EDITS[step % 2], sources[0]
        text = self.encoders.encode([SEPARATOR.join(prompt) for prompt in prompts], length)
        shuffled = torch.where(torch.rand(_BATCH, 1, generator=rng) < 0.5, text.pooled.roll(1, 0), text.pooled)
        uniform = torch.rand(_BATCH, generator=rng)
        sigma = _SHIFT * uniform / (1 + (_SHIFT - 1) * uniform)
        noise = torch.randn(targets.shape, generator=rng)
        noised = torch.lerp(targets, noise, sigma[:, None, None, None])
        guidance = 1 + 4 * torch.rand((), generator=rng).item()
        predicted = self.model.velocity(noised, sigma, Text(text.states, shuffled), guidance, [sources])
        weight = sigma[:, None, None, None] * (1 + (_OBJECT_WEIGHT - 1) * self.samples.objects[chosen])
        return (weight * (predicted - (noise - targets)) ** 2).mean()


def _build_optimizer(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
