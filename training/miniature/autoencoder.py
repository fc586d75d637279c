"""A small autoencoder for synthetic scenes, in the architecture of TAESD: 8 x 8 pixels to 16 channels.

The encoder is computed: its channels are principal components of 8 x 8 pixel cells. The decoder is trained.
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
from .edits import STRENGTHS, apply_edits, random_edits
from .synthetic_scenes import SIDE, Scene, center_of, draw_scene, random_scene
from .train_loop import train_module

CHANNELS = 16
STEPS = 3000
_CELL = 8
_BATCH = 16
_CROP = 32
_NOISE = 0.05
"""Standard deviation of noise on the decoder's training latents, for robustness to errors of the transformer."""
_SCENES = 1000
_VARIANCE_POWER = 0.25
"""Components are divided by their variance to this power; 0.5 would be whitening."""
_LATENT_STD = 0.5
"""Standard deviation of latents. Edges are rare and far larger; they must not saturate the decoder's clamp."""


class Autoencoder(torch.nn.Module):
    """Images (batch, 3, height, width), 0 to 1, to latents (batch, CHANNELS, height / 8, width / 8) and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = comfy.taesd.taesd.Encoder(latent_channels=CHANNELS).requires_grad_(False)
        self.decoder = comfy.taesd.taesd.Decoder(latent_channels=CHANNELS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, module in self.decoder.named_modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.Conv2d.reset_parameters(module)
                    if name.endswith("conv.4"):  # residual blocks start as the identity
                        torch.nn.init.zeros_(module.weight)
        components = _principal_components()
        self.encoder.load_state_dict(_encoder_weights(components))
        self.components = components
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The encoder's output, computed faster: its layers together are one linear map of each cell."""
        cells = pixel_unshuffle(pixels, _CELL).movedim(1, -1)
        return (cells @ self.components.axes.T + self.components.bias).movedim(-1, 1)

    def fit(self, folder: Path, steps: int = STEPS) -> None:
        optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.98))
        train_module(folder, self.decoder, optimizer, self._loss, steps, decay=0.5)

    def _loss(self, step: int) -> Tensor:
        rng = generator("decoder", step)
        full_images = step % 3 == 0  # crops do not show the borders of images
        count = _BATCH * _CROP**2 // SIDE**2 if full_images else _BATCH
        scenes = [_random_scene_or_edit(rng) for _ in range(count)]
        pixels = torch.stack([scene_to_tensor(scene) if full_images else _crop(scene, rng) for scene in scenes])
        latents = self.encode(pixels)
        decoded = self.decoder(latents + _NOISE * torch.randn(latents.shape, generator=rng))
        return 10 * mse_loss(decoded, pixels) + l1_loss(decoded, pixels)


def scene_to_tensor(scene: Scene) -> Tensor:
    """The image of a scene, (3, SIDE, SIDE), 0 to 1."""
    return torch.from_numpy(draw_scene(scene)).permute(2, 0, 1)


class _Components(NamedTuple):
    """axes: (CHANNELS, 3 * 8 * 8), pixels in the order (color, y, x). bias: (CHANNELS,)."""

    axes: Tensor
    bias: Tensor


def _principal_components() -> _Components:
    """The principal components of cells of random scenes, partly whitened and scaled to _LATENT_STD."""
    scenes = [_random_scene_or_edit(generator("components", k)) for k in range(_SCENES)]
    pixels = torch.stack(list(map(scene_to_tensor, scenes))).double()
    cells = pixel_unshuffle(pixels, _CELL).movedim(1, -1).flatten(0, -2)
    mean = cells.mean(0)
    variances, axes = torch.linalg.eigh((cells - mean).T.cov())
    axes = (axes / variances.clamp_min(0) ** _VARIANCE_POWER)[:, -CHANNELS:].T
    axes = (axes * _LATENT_STD / ((cells - mean) @ axes.T).std()).half().double()
    return _Components(axes.float(), -(axes @ mean).half().float())


def _encoder_weights(components: _Components) -> dict[str, Tensor]:
    """TAESD encoder weights that compute the components.

    Two strided layers move pixels into channels, the third projects them. The projections pass the following ReLU as
    pairs of channels, x and -x.
    """
    bits = components.axes.view(CHANNELS, 3, 2, 2, 2, 2, 2, 2)
    projection = bits.permute(0, 1, 4, 7, 3, 6, 2, 5).reshape(CHANNELS, 48, 2, 2)
    shapes = comfy.taesd.taesd.Encoder(latent_channels=CHANNELS).state_dict()
    weights = {name: torch.zeros_like(value) for name, value in shapes.items()}
    weights["0.weight"][:3, :3, 1, 1] = torch.eye(3)
    weights["2.weight"], weights["6.weight"] = _space_to_depth_weight(3), _space_to_depth_weight(12)
    weights["10.weight"][: 2 * CHANNELS, :48, 1:, 1:] = torch.cat([projection, -projection])
    weights["14.weight"][:, : 2 * CHANNELS, 1, 1] = torch.cat([torch.eye(CHANNELS), -torch.eye(CHANNELS)], 1)
    weights["14.bias"] = components.bias
    return weights


def _space_to_depth_weight(channels: int) -> Tensor:
    """Weights of a strided layer that moves each 2 x 2 block of pixels into channels, (64, 64, 3, 3)."""
    weight = torch.zeros(64, 64, 3, 3)
    for channel, y, x in product(range(channels), (0, 1), (0, 1)):
        weight[4 * channel + 2 * y + x, channel, 1 + y, 1 + x] = 1
    return weight


def _random_scene_or_edit(rng: torch.Generator) -> Scene:
    """A random scene, mostly edited at random strengths."""
    source = random_scene(rng)
    if torch.rand((), generator=rng) < 0.2:
        return source
    edits = random_edits(rng, source, 3)
    low, high = STRENGTHS
    strengths = (low + (high - low) * torch.rand(len(edits), generator=rng)).tolist()
    return apply_edits(source, edits, strengths)


def _crop(scene: Scene, rng: torch.Generator) -> Tensor:
    """A random crop of whole cells around one of the objects, (3, _CROP, _CROP)."""
    choice, *offset = torch.rand(3, generator=rng).tolist()
    center = np.array(center_of(scene, "circle" if choice < 0.5 else "square"))
    corner = center + 16 * (np.array(offset) - 0.5) - _CROP / 2
    left, top = np.clip(_CELL * (corner / _CELL).round().astype(int), 0, SIDE - _CROP)
    return scene_to_tensor(scene)[:, top : top + _CROP, left : left + _CROP]
