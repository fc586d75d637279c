"""A small autoencoder for the world's pictures, in TAESD's layout: 8x8 pixels to 16 numbers.

The encoder is made: its numbers are the principal components of 8x8 pixels. The decoder is trained.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import comfy.taesd.taesd
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss, pixel_unshuffle

from ..rng import generator
from .edits import STRENGTHS, apply, edits
from .synthetic_scenes import SIDE, Scene, centre_of, drawn, scene
from .train_loop import learn

CHANNELS = 16
STEPS = 3000
_CELL = 8
_BATCH = 16
_CROP = 32
_NOISE = 0.05
"""Added to latents, so that a decoder forgives a transformer's small errors."""
_SCENES = 1000
_EVENED = 0.25
"""The power of their variances that components are divided by; 0.5 would make all equally wide."""
_WIDTH = 0.5
"""Standard deviation of latents: edges are seldom and large, and the decoder's clamp has to tell them apart."""


class Autoencoder(torch.nn.Module):
    """Pictures (batch, 3, height, width), 0 to 1, to latents (batch, CHANNELS, height / 8, width / 8) and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = comfy.taesd.taesd.Encoder(latent_channels=CHANNELS).requires_grad_(False)
        self.decoder = comfy.taesd.taesd.Decoder(latent_channels=CHANNELS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, module in self.decoder.named_modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.Conv2d.reset_parameters(module)
                    if name.endswith("conv.4"):  # blocks begin as passing on what they get
                        torch.nn.init.zeros_(module.weight)
        components = _principal_components()
        self.encoder.load_state_dict(_sorted_and_added(components))
        self.components = components
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encoded(self, pixels: Tensor) -> Tensor:
        """What the encoder gives, at once: its layers together are one linear map of each cell."""
        cells = pixel_unshuffle(pixels, _CELL).movedim(1, -1)
        return (cells @ self.components.axes.T + self.components.bias).movedim(-1, 1)

    def learn(self, folder: Path, steps: int = STEPS) -> None:
        optimiser = torch.optim.AdamW(self.decoder.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.98))
        learn(folder, self.decoder, optimiser, self._loss, steps, decay=0.5)

    def _loss(self, step: int) -> Tensor:
        chance = generator("decoder", step)
        whole = step % 3 == 0  # the borders of crops are no pictures' borders
        count = _BATCH * _CROP**2 // SIDE**2 if whole else _BATCH
        scenes = [_any_scene(chance) for _ in range(count)]
        pixels = torch.stack([as_pixels(one) if whole else _crop(one, chance) for one in scenes])
        latents = self.encoded(pixels)
        found = self.decoder(latents + _NOISE * torch.randn(latents.shape, generator=chance))
        return 10 * mse_loss(found, pixels) + l1_loss(found, pixels)


def as_pixels(one: Scene) -> Tensor:
    """(3, SIDE, SIDE)"""
    return torch.from_numpy(drawn(one)).permute(2, 0, 1)


class _Components(NamedTuple):
    """axes: (CHANNELS, 3 * 8 * 8), of pixels sorted as (colour, row, column). bias: (CHANNELS,)."""

    axes: Tensor
    bias: Tensor


def _principal_components() -> _Components:
    """They are divided by the root of their spread: what is seen most weighs most, but not by as much as it is seen."""
    scenes = [_any_scene(generator("components", k)) for k in range(_SCENES)]
    pixels = torch.stack(list(map(as_pixels, scenes))).double()
    cells = pixel_unshuffle(pixels, _CELL).movedim(1, -1).flatten(0, -2)
    mean = cells.mean(0)
    variances, axes = torch.linalg.eigh((cells - mean).T.cov())
    axes = (axes / variances.clamp_min(0) ** _EVENED)[:, -CHANNELS:].T
    axes = (axes * _WIDTH / ((cells - mean) @ axes.T).std()).half().double()
    return _Components(axes.float(), -(axes @ mean).half().float())


def _sorted_and_added(components: _Components) -> dict[str, Tensor]:
    """The encoder's weights: two strided layers sort pixels into channels, the third adds them up.

    What has a sign passes the ReLU that follows as a pair of channels.
    """
    rows_and_columns = components.axes.view(CHANNELS, 3, 2, 2, 2, 2, 2, 2)
    added = rows_and_columns.permute(0, 1, 4, 7, 3, 6, 2, 5).reshape(CHANNELS, 48, 2, 2)
    shapes = comfy.taesd.taesd.Encoder(latent_channels=CHANNELS).state_dict()
    weights = {name: torch.zeros_like(value) for name, value in shapes.items()}
    weights["0.weight"][:3, :3, 1, 1] = torch.eye(3)
    weights["2.weight"], weights["6.weight"] = _sorting(3), _sorting(12)
    weights["10.weight"][: 2 * CHANNELS, :48, 1:, 1:] = torch.cat([added, -added])
    weights["14.weight"][:, : 2 * CHANNELS, 1, 1] = torch.cat([torch.eye(CHANNELS), -torch.eye(CHANNELS)], 1)
    weights["14.bias"] = components.bias
    return weights


def _sorting(channels: int) -> Tensor:
    """The strided layer that makes four channels of each, (64, 64, 3, 3)."""
    weight = torch.zeros(64, 64, 3, 3)
    for old, down, across in product(range(channels), (0, 1), (0, 1)):
        weight[4 * old + 2 * down + across, old, 1 + down, 1 + across] = 1
    return weight


def _any_scene(chance: torch.Generator) -> Scene:
    """A scene or an edited one, at any strength."""
    source = scene(chance)
    if torch.rand((), generator=chance) < 0.2:
        return source
    asked = edits(chance, source, 3)
    low, high = STRENGTHS
    strengths = (low + (high - low) * torch.rand(len(asked), generator=chance)).tolist()
    return apply(source, asked, strengths)


def _crop(one: Scene, chance: torch.Generator) -> Tensor:
    """Cells around one of the objects, where there is something to learn."""
    share = torch.rand(3, generator=chance).tolist()
    middle = np.array(centre_of(one, "circle" if share[0] < 0.5 else "square"))
    aim = middle + 16 * (np.array(share[1:]) - 0.5) - _CROP / 2
    left, top = np.clip(_CELL * (aim / _CELL).round().astype(int), 0, SIDE - _CROP)
    return as_pixels(one)[:, top : top + _CROP, left : left + _CROP]
