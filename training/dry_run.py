"""Estimates memory, disk space and time of a run from a few real training steps, without saving them."""

from __future__ import annotations

import time

import comfy.model_management
import psutil
import torch
from accelerate import Accelerator

from .config import TrainingConfig
from .run import Run
from .sample_cache import Progress

STEPS = 3


def dry_run(config: TrainingConfig, accelerator: Accelerator, on_progress: Progress) -> str:
    """Take STEPS training steps on as few examples as possible. Returns a report of sizes, memory, disk and time.

    Raises the errors that would stop the run: missing files, unreadable images, instructions, settings.
    """
    short = config.model_copy(update={"run": config.run.model_copy(update={"steps": STEPS})})
    run = Run.prepare(short, accelerator, on_progress, max_examples=STEPS * config.run.batch_size)
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        run.train_step()
        seconds.append(time.perf_counter() - started)
        run.step += 1
    examples = run.all_examples
    num_prompts = len({*run.objective.prompts(examples.training, config.run.steps, config.run.batch_size)})
    num_images = len(
        {target.image for e in examples.training for target in e.targets} | {e.source for e in examples.training}
    )
    text = run.cache.prompt(run.examples.training[0].instructions).text
    latent = run.cache.latent(run.examples.training[0].source)
    disk = num_prompts * _num_bytes(text.states, text.pooled) + num_images * _num_bytes(latent)
    trainable = sum(parameter.numel() for parameter in run.trainables.parameters())
    step = min(seconds[1:])
    return "\n".join(
        [
            f"examples: {len(examples.training)} for training, {len(examples.validation)} for validation",
            f"model: {run.model.num_parameters / 1e6:.1f} million parameters, {run.model.dtype} on {run.model.device}",
            f"adapter: {trainable / 1e6:.3f} million parameters; {trainable * 16 / 1e9:.2f} GB with optimizer state",
            f"cache: {num_prompts} prompts and {num_images} images, {disk / 1e9:.2f} GB in {config.cache_folder}",
            f"memory: {_memory(run.model.device)}",
            f"time: {step:.2f} s per step, {step * config.run.steps / 3600:.2f} hours for {config.run.steps} steps, "
            "without the rendering of validation images",
        ]
    )


def _num_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _memory(device: torch.device) -> str:
    if comfy.model_management.is_device_cuda(device):
        return f"peak of {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU"
    return f"{psutil.Process().memory_info().rss / 1e9:.2f} GB in this process"
