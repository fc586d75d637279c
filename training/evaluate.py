"""What an adapter does, in pictures and numbers, on the held-out examples of a config."""

from __future__ import annotations

import statistics
from pathlib import Path

from accelerate import Accelerator

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.strength_projector import read_projector
from slider_core.errors import SliderError

from .config import Config
from .errors import TrainingError
from .run import Run
from .sample_cache import Progress
from .validation import Curve, Renderer, Slider


def evaluate(config: Config, file: Path | None, accelerator: Accelerator, on_progress: Progress) -> tuple[Path, str]:
    """Render the held-out examples with an adapter file, or with what the config has trained.

    Returns the folder with sheets and curves, and a summary. Raises TrainingError when the file does not fit.
    """
    file = file or config.output / f"{config.name}.safetensors"
    slider = _slider(config, file)
    run = Run(config, accelerator, on_progress, most_examples=max(config.data.held_out, 1))
    if not run.examples.held_out:
        raise TrainingError("There are no held-out examples to look at; set data.held_out to 1 or more.")
    folder = config.output / "evaluation" / file.stem
    try:
        curves = Renderer(run.base.patcher, run.cache, config.samples).write(slider, run.examples.held_out, folder)
    except SliderError as error:
        raise TrainingError(str(error)) from error
    return folder, _summary(curves)


def _slider(config: Config, file: Path) -> Slider:
    try:
        return read_projector(file) if config.method == "projector" else read_adapter(file)
    except SliderError as error:
        raise TrainingError(str(error)) from error


def _summary(curves: list[Curve]) -> str:
    lines = [f"strips with one slider: {len(curves)}"]
    for name, meaning in (
        ("rising", "share of the steps that lead further from the source"),
        ("first_order", "share of the largest change between neighbours"),
        ("delta_smooth", "largest detour"),
    ):
        values = [value for found in curves if (value := getattr(found, name)) is not None]
        if values:
            lines.append(f"{name}: {statistics.mean(values):.4f} ({meaning})")
    return "\n".join(lines)
