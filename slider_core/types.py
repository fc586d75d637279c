"""Types that several folders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CondEntry = list[Any]
"""One entry of a CONDITIONING: [text tokens of shape (batch, tokens, width), dict of options]."""

Conditioning = list[CondEntry]
"""ComfyUI's CONDITIONING."""

OnStep = Callable[[int, torch.Tensor, torch.Tensor, int], None]
"""ComfyUI's sampling callback: (step from 0, predicted image latent, noisy latent, number of steps)."""
