"""Optimisers, schedules and averaged weights by their names in a config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import Optimiser as Settings
from .errors import TrainingError


def optimiser(settings: Settings, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, AdamW with 8-bit state, or Prodigy. Raises TrainingError when its package is not installed."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        if settings.kind == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, **options)
        from prodigyopt import Prodigy

        return Prodigy(parameters, **options)
    except ImportError as error:
        package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[settings.kind]
        raise TrainingError(
            f"optimiser.kind {settings.kind} needs the package {package}: pip install {package}. Or use adamw."
        ) from error


def schedule(settings: Settings, of: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over a run."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return get_scheduler(name, of, num_warmup_steps=settings.warmup_steps, num_training_steps=steps)


def average(settings: Settings, learning: torch.nn.Module) -> AveragedModel | None:
    """Exponentially averaged weights, if the config wants them."""
    return AveragedModel(learning, multi_avg_fn=get_ema_multi_avg_fn(settings.ema)) if settings.ema else None
