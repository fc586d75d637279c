"""The loop that all parts of the miniature model learn in: the same every time, resumable, its curve kept."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slider_core.atomic_write import atomic_write

from ..checkpoints import Checkpoints

_WARMUP = 100
_CLIP = 1.0
_LOG = logging.getLogger(__name__)

Loss = Callable[[int], torch.Tensor]
"""The loss of a step's samples. The step is the only chance in it."""


def learn(
    folder: Path,
    module: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    loss: Loss,
    steps: int,
    *,
    decay: float = 0.3,
    save_every: int = 500,
) -> None:
    """Train `module` until `steps`, going on from the newest checkpoint in `folder`; curve.jsonl there has the losses.

    The learning rate warms up, stays, and falls straight to 0 over the last share `decay` of the steps: before that,
    more steps go on from what fewer did.
    """
    checkpoints, first = Checkpoints(folder, keep=2), 0
    rate = optimiser.defaults["lr"]
    if found := checkpoints.newest():
        first, state = found
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        _LOG.info("Going on from step %d.", first)
    curve = _curve(folder / "curve.jsonl", first)
    [group] = optimiser.param_groups
    started = time.monotonic()
    losses: list[float] = []
    for step in range(first, steps):
        group["lr"] = rate * min((step + 1) / _WARMUP, 1, (steps - step) / (decay * steps))
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), _CLIP)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(value.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses) / len(losses)
            curve.append({"step": step + 1, "loss": mean})
            atomic_write(folder / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in curve).encode())
            speed = (time.monotonic() - started) / (step + 1 - first)
            _LOG.info("step %d of %d: loss %.5f, %.2f s a step", step + 1, steps, mean, speed)
            losses.clear()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            checkpoints.save(step + 1, {"module": module.state_dict(), "optimiser": optimiser.state_dict()})


def _curve(file: Path, until: int) -> list[dict[str, float]]:
    """What is known of the steps that need not be taken again."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [point for point in map(json.loads, lines) if point["step"] <= until]
