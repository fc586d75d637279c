"""The miniature edit model: FLUX.1 Kontext's architecture, trained from scratch on the world's full edits."""

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

from ..frozen_model import BaseModel, Text
from ..objectives import NEUTRAL
from ..rng import generator
from .latent_bank import Samples
from .text_encoders import CLIP_L, T5, TextEncoders
from .train_loop import learn

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
_ROWS = {20: 0.6, 24: 0.25, 32: 0.08, 48: 0.04, 96: 0.02, 256: 0.01}
"""How many rows the text is padded to, and how often. Any padding has to do, and short ones cost least."""
_NO_EDITS = ((), NEUTRAL)
_OBJECTS_WEIGH = 4.0
_SHIFT = 3.0
"""More of the noise levels are high ones, where what the edit does is decided."""


def untrained() -> BaseModel:
    """The model with random weights; it begins as saying that what it sees is noise, and blocks as doing nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flux = comfy.ldm.flux.model.Flux(
            **FLUX, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
        )
        weights = {name: _start(name, value) for name, value in flux.state_dict().items()}
    base = BaseModel(
        comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32}), checkpointing=False
    )
    base.network.requires_grad_(True)
    return base


def _start(name: str, value: Tensor) -> Tensor:
    if name in ("img_in.weight", "final_layer.linear.weight"):
        return torch.eye(*value.shape)
    if "norm" in name:
        return torch.ones(value.shape)
    if name.endswith("bias") or "_mod.lin" in name or "modulation" in name:
        return torch.zeros(value.shape)
    return torch.randn(value.shape) / math.sqrt(value.shape[1])


class Lessons:
    """The loss of each step.

    Squared errors of the velocity, times sigma: at low noise a picture's small errors are large ones of the velocity.
    """

    def __init__(self, base: BaseModel, encoders: TextEncoders, samples: Samples):
        self.base, self.encoders, self.samples = base, encoders, samples

    def learn(self, folder: Path, steps: int = STEPS) -> None:
        with self.base.changed({}):
            learn(folder, self.base.network, _optimiser(self.base.network), self.loss, steps)

    def loss(self, step: int) -> Tensor:
        chance = generator("transformer", step)
        chosen = torch.randint(len(self.samples.instructions), (_BATCH,), generator=chance)
        sources, targets = self.samples.sources[chosen].float(), self.samples.targets[chosen].float()
        prompts = [self.samples.instructions[k] for k in chosen.tolist()]
        rows = list(_ROWS)[int(torch.multinomial(torch.tensor(list(_ROWS.values())), 1, generator=chance))]
        if torch.rand((), generator=chance) < 0.5:
            prompts[0], targets[0] = _NO_EDITS[step % 2], sources[0]
        text = self.encoders.encoded([SEPARATOR.join(prompt) for prompt in prompts], rows)
        shuffled = torch.where(torch.rand(_BATCH, 1, generator=chance) < 0.5, text.pooled.roll(1, 0), text.pooled)
        even = torch.rand(_BATCH, generator=chance)
        sigma = _SHIFT * even / (1 + (_SHIFT - 1) * even)
        noise = torch.randn(targets.shape, generator=chance)
        mixed = torch.lerp(targets, noise, sigma[:, None, None, None])
        guidance = 1 + 4 * torch.rand((), generator=chance).item()
        said = self.base.velocity(mixed, sigma, Text(text.states, shuffled), guidance, [sources])
        weight = sigma[:, None, None, None] * (1 + (_OBJECTS_WEIGH - 1) * self.samples.objects[chosen])
        return (weight * (said - (noise - targets)) ** 2).mean()


def _optimiser(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
