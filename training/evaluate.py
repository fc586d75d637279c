"""Evaluates an adapter file on the validation examples of a config."""

from __future__ import annotations

import statistics
from pathlib import Path

from accelerate import Accelerator

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.strength_projector import read_projector

from .config import TrainingConfig
from .errors import TrainingError
from .run import Run
from .sample_cache import Progress
from .validation import Slider, StrengthCurve, ValidationRenderer


def evaluate(
    config: TrainingConfig, file: Path | None, accelerator: Accelerator, on_progress: Progress
) -> tuple[Path, str]:
    """Render the validation examples with an adapter file; None = the adapter that the config's run has written.

    Returns the folder of contact sheets and curves, and a summary. Raises TrainingError when there are no validation
    examples, SliderError when the file cannot be read or does not fit the model.
    """
    file = file or config.output / f"{config.name}.safetensors"
    slider: Slider = read_projector(file) if config.method == "projector" else read_adapter(file)
    run = Run.prepare(config, accelerator, on_progress, max_examples=max(config.data.num_validation, 1))
    if not run.examples.validation:
        raise TrainingError("There are no validation examples; set data.num_validation to 1 or more.")
    folder = config.output / "evaluation" / file.stem
    renderer = ValidationRenderer(run.model.patcher, run.cache, config.validation)
    return folder, _summary(renderer.write(slider, run.examples.validation, folder))


def _summary(curves: list[StrengthCurve]) -> str:
    lines = [f"examples with one slider: {len(curves)}"]
    for name, meaning in (
        ("rising", "fraction of the intervals that move away from the source"),
        ("first_order", "largest change between adjacent strengths, divided by the total change"),
        ("delta_smooth", "largest detour"),
    ):
        values = [value for curve in curves if (value := getattr(curve, name)) is not None]
        if values:
            lines.append(f"{name}: {statistics.mean(values):.4f} ({meaning})")
    return "\n".join(lines)
