"""The effect of calibration on sliders of the miniature edit model, on validation scenes.

    python run.py benchmark --only slider_calibration [--scenes N]

Each method's sweep of 9 strengths from 0 to 1 gives a curve (slider_core/metrics/calibration.py, pixel distances).
Then 9 even positions are rendered: uncalibrated; with the scene's own curve; with the curve of the same instruction,
from the mean of its sweeps in 4 other scenes; with one curve for all instructions, from the mean of the other scenes'
sweeps; and the first two with other noise than the curve was made with.

    linearity       mean |edit reached - position|, the edit reached being read back from the images; mean over scenes
    delta           largest detour of the images (delta_smooth of Kontinuous Kontext, pixel distances); mean over scenes
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import in_training  # noqa: F401  # isort: skip

from slider_core.metrics.calibration import calibrate
from slider_core.metrics.image_distance import ImageDistances, pixel_distances
from slider_core.metrics.smoothness import delta_smooth
from training.miniature.edits import VALIDATION_SEEDS, Edit, edit_fits
from training.miniature.evaluate import validation_tasks
from training.miniature.read_attributes import reached_strength, read_attributes
from training.miniature.slider_methods import METHODS, Miniature
from training.miniature.synthetic_scenes import Scene, random_scene
from training.rng import generator

ROOT = Path(__file__).resolve().parents[1]
EVEN = tuple(k / 8 for k in range(9))
CALIBRATED_METHODS = (
    "STLoRA",
    "GSTLoRA",
    "strength projector",
    "text modulation",
    "attention to text",
    "token interpolation",
    "Velocity Blending",
    "Prompt Difference",
    "FlowSlider",
)
COLUMNS = (
    "uncalibrated",
    "own curve",
    "the instruction's curve, from other scenes",
    "one curve for all",
    "other noise, uncalibrated",
    "other noise, own curve",
)
NUM_OTHER_SCENES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--models", type=Path, default=ROOT / "demo" / "miniature")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(CALIBRATED_METHODS))
    args, _ = parser.parse_known_args()
    miniature = Miniature(args.models)
    print("| method | measure | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for name in args.methods:
        results = measure(miniature, name, args.scenes)
        for measure_name, row in zip(("linearity", "delta"), results.mean(0).T):
            print(f"| {name} | {measure_name} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)


def measure(miniature: Miniature, name: str, scenes: int) -> np.ndarray:
    """(scenes, COLUMNS, 2): linearity and delta."""
    tasks = validation_tasks(scenes, 1)
    sweeps = [_sweep_distances(miniature, name, source, edits[0]) for source, edits in tasks]
    results = []
    for k, (source, edits) in enumerate(tasks):
        others = [
            _sweep_distances(miniature, name, other, edits[0]) for other in scenes_for(edits[0], NUM_OTHER_SCENES)
        ]
        own, same, any_other = (
            calibrate(EVEN, sweep).calibration.strengths_at(EVEN)
            for sweep in (sweeps[k], _mean(others), _mean(sweeps[:k] + sweeps[k + 1 :]))
        )
        settings = (
            *((curve, "sliding") for curve in (EVEN, own, same, any_other)),
            *((curve, "other noise") for curve in (EVEN, own)),
        )
        results.append(
            [_metrics(render(miniature, name, source, edits, *setting), source, edits[0]) for setting in settings]
        )
    return np.array(results)


def scenes_for(edit: Edit, count: int) -> list[Scene]:
    """Scenes that are used nowhere else, in which the edit changes something."""
    scenes = (random_scene(generator(seed, "alike")) for seed in VALIDATION_SEEDS)
    return list(itertools.islice((one for one in scenes if edit_fits(one, edit)), count))


def _sweep_distances(miniature: Miniature, name: str, source: Scene, edit: Edit) -> ImageDistances:
    return pixel_distances(render(miniature, name, source, [edit], EVEN))


def render(
    miniature: Miniature,
    name: str,
    source: Scene,
    edits: Sequence[Edit],
    strengths: Sequence[float],
    seed: str = "sliding",
) -> torch.Tensor:
    return torch.from_numpy(
        miniature.render(source, METHODS[name](miniature, edits, 0, strengths), len(strengths), seed)
    )


def _metrics(images: torch.Tensor, source: Scene, edit: Edit) -> tuple[float, float]:
    reached = [reached_strength(edit, source, read_attributes(image.numpy(), source)) for image in images]
    distances = pixel_distances(images)
    linearity = float(np.abs(np.subtract(reached, EVEN)).mean())
    return linearity, delta_smooth(distances.adjacent, distances.skip_one)


def _mean(sweeps: Sequence[ImageDistances]) -> ImageDistances:
    """The mean of sweeps, each scaled to a total change of 1."""
    adjacent = np.mean([np.divide(one.adjacent, sum(one.adjacent)) for one in sweeps], 0).tolist()
    return ImageDistances("mean of several sweeps", tuple(adjacent), (), (0.0, *np.cumsum(adjacent).tolist()))


if __name__ == "__main__":
    main()
