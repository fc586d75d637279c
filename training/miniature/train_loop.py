"""The training loop for all parts of the miniature model: deterministic and resumable, with a loss curve on disk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slider_core.atomic_write import atomic_write

from ..checkpoints import Checkpoints

_WARMUP_STEPS = 100
_MAX_GRAD_NORM = 1.0
_LOG = logging.getLogger(__name__)

Loss = Callable[[int], torch.Tensor]
"""The loss of a step. All its randomness is seeded by the step."""


def train_module(
    folder: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    steps: int,
    *,
    decay: float = 0.3,
    save_every: int = 500,
) -> None:
    """Train `module` up to `steps`, resuming from the last checkpoint in `folder`. Writes the losses to curve.jsonl.

    The learning rate is warmed up, then constant, then decays linearly to 0 over the last fraction `decay` of the
    steps. Up to the decay, longer runs are identical to shorter ones.
    """
    checkpoints, first = Checkpoints(folder, keep_last=2), 0
    learning_rate = optimizer.defaults["lr"]
    if checkpoint := checkpoints.newest():
        first, state = checkpoint
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        _LOG.info("Resuming from step %d.", first)
    curve = _read_curve(folder / "curve.jsonl", first)
    [group] = optimizer.param_groups
    started = time.monotonic()
    losses: list[float] = []
    for step in range(first, steps):
        group["lr"] = learning_rate * min((step + 1) / _WARMUP_STEPS, 1, (steps - step) / (decay * steps))
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses) / len(losses)
            curve.append({"step": step + 1, "loss": mean})
            atomic_write(folder / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in curve).encode())
            seconds = (time.monotonic() - started) / (step + 1 - first)
            _LOG.info("step %d of %d: loss %.5f, %.2f s per step", step + 1, steps, mean, seconds)
            losses.clear()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            checkpoints.save(step + 1, {"module": module.state_dict(), "optimizer": optimizer.state_dict()})


def _read_curve(file: Path, last_step: int) -> list[dict[str, float]]:
    """The points of a curve up to `last_step`; later steps are repeated."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [point for point in map(json.loads, lines) if point["step"] <= last_step]
