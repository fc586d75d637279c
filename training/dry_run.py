"""What a run will take, from a few of its steps that are really taken, without saving anything of them."""

from __future__ import annotations

import time

import comfy.model_management
import psutil
import torch
from accelerate import Accelerator

from .config import Config
from .run import Run
from .sample_cache import Progress

STEPS = 3


def dry_run(config: Config, accelerator: Accelerator, on_progress: Progress) -> str:
    """Take STEPS steps on as few examples as that needs. Returns a report of sizes, memory, disk and time.

    Raises TrainingError for everything that would stop the run: files, pictures, instructions, settings.
    """
    short = config.model_copy(update={"run": config.run.model_copy(update={"steps": STEPS})})
    run = Run(short, accelerator, on_progress, most_examples=STEPS * config.run.batch)
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        run.take_step()
        seconds.append(time.perf_counter() - started)
        run.step += 1
    whole = run.all_examples
    prompts = len({*run.objective.prompts(whole.training, config.run.steps, config.run.batch)})
    pictures = len(
        {target.picture for e in whole.training for target in e.targets} | {e.source for e in whole.training}
    )
    text = run.cache.prompt(run.examples.training[0].instructions).text
    latent = run.cache.latent(run.examples.training[0].source)
    disk = prompts * _bytes(text.states, text.pooled) + pictures * _bytes(latent)
    learning = sum(parameter.numel() for parameter in run.learning.parameters())
    step = min(seconds[1:])
    return "\n".join(
        [
            f"examples: {len(whole.training)} to learn from, {len(whole.held_out)} held out",
            f"base: {run.base.parameters / 1e6:.1f} million parameters, {run.base.dtype} on {run.base.device}",
            f"adapter: {learning / 1e6:.3f} million parameters; {learning * 16 / 1e9:.2f} GB with its optimiser",
            f"cache: {prompts} prompts and {pictures} pictures, {disk / 1e9:.2f} GB in {config.cache_folder}",
            f"memory: {_memory(run.base.device)}",
            f"time: {step:.2f} s a step, {step * config.run.steps / 3600:.2f} hours for {config.run.steps} steps, "
            "without the pictures that are rendered on the way",
        ]
    )


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _memory(device: torch.device) -> str:
    if comfy.model_management.is_device_cuda(device):
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of the GPU at its peak"
    return f"{psutil.Process().memory_info().rss / 1e9:.2f} GB of this process"
