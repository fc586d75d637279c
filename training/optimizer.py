"""Optimizer, learning rate scheduler and EMA weights from a config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import OptimizerConfig
from .errors import TrainingError


def build_optimizer(config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, AdamW with 8-bit state, or Prodigy. Raises TrainingError when the optimizer's package is missing."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    if config.type == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        if config.type == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, **options)
        from prodigyopt import Prodigy

        return Prodigy(parameters, **options)
    except ImportError as error:
        package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}[config.type]
        raise TrainingError(
            f"optimizer.type {config.type} needs the package {package}: pip install {package}. Or use adamw."
        ) from error


def build_lr_scheduler(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate scheduler for a run of `steps` steps."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def build_ema(config: OptimizerConfig, trainables: torch.nn.Module) -> AveragedModel | None:
    """The exponential moving average of the weights; None if ema_decay is 0."""
    return AveragedModel(trainables, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None
