"""What calibration does to sliders on the miniature edit model, on scenes that nothing was trained on.

    python run.py benchmark --only slider_calibration [--scenes N]

Each method's sweep of 9 strengths, 0 to 1, gives a curve (slider_core/calibration.py, by pixels). Then 9 even positions
are rendered: uncalibrated; with the scene's own curve; with the curve of the same instruction, from the mean of what
its sweeps showed in 4 other scenes; with one curve for all instructions, from the mean of the other scenes' sweeps; and
the first two from other noise than the curve was made with.

    linearity       mean |reached - position|, with what is reached read back from the pictures; mean of the scenes
    delta           largest detour of the pictures, by pixels; mean of the scenes
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
from training.miniature.edits import HELD_OUT_SEEDS, Edit, fits
from training.miniature.evaluate import held_out_tasks
from training.miniature.read_attributes import edit_reached, measured
from training.miniature.slider_methods import METHODS, Miniature
from training.miniature.synthetic_scenes import Scene, scene
from training.rng import generator

ROOT = Path(__file__).resolve().parents[1]
EVEN = tuple(k / 8 for k in range(9))
CALIBRATED = (
    "STLoRA",
    "GSTLoRA",
    "strength projector",
    "text modulation",
    "attention to text",
    "token interpolation",
    "velocity blending",
    "prompt difference",
    "fidelity and steering",
)
COLUMNS = (
    "uncalibrated",
    "own curve",
    "the instruction's curve, from other scenes",
    "one curve for all",
    "other noise, uncalibrated",
    "other noise, own curve",
)
ALIKE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--models", type=Path, default=ROOT / "demo" / "miniature")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(CALIBRATED))
    args, _ = parser.parse_known_args()
    it = Miniature(args.models)
    print("| method | measure | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for name in args.methods:
        found = measure(it, name, args.scenes)
        for measure_name, row in zip(("linearity", "delta"), found.mean(0).T):
            print(f"| {name} | {measure_name} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)


def measure(it: Miniature, name: str, scenes: int) -> np.ndarray:
    """(scenes, COLUMNS, 2): linearity and delta."""
    tasks = held_out_tasks(scenes, 1)
    sweeps = [_swept(it, name, source, edits[0]) for source, edits in tasks]
    found = []
    for k, (source, edits) in enumerate(tasks):
        alike = [_swept(it, name, other, edits[0]) for other in scenes_for(edits[0], ALIKE)]
        own, same, any_other = (
            calibrate(EVEN, sweep).calibration.strength(EVEN)
            for sweep in (sweeps[k], _mean(alike), _mean(sweeps[:k] + sweeps[k + 1 :]))
        )
        renders = (
            *((curve, "sliding") for curve in (EVEN, own, same, any_other)),
            *((curve, "other noise") for curve in (EVEN, own)),
        )
        found.append([_judged(rendered(it, name, source, edits, *how), source, edits[0]) for how in renders])
    return np.array(found)


def scenes_for(edit: Edit, count: int) -> list[Scene]:
    """Scenes that nothing else was tried on, in which the edit is to be seen."""
    scenes = (scene(generator(seed, "alike")) for seed in HELD_OUT_SEEDS)
    return list(itertools.islice((one for one in scenes if fits(one, edit)), count))


def _swept(it: Miniature, name: str, source: Scene, edit: Edit) -> ImageDistances:
    return pixel_distances(rendered(it, name, source, [edit], EVEN))


def rendered(
    it: Miniature, name: str, source: Scene, edits: Sequence[Edit], strengths: Sequence[float], seed: str = "sliding"
) -> torch.Tensor:
    return torch.from_numpy(it.pictures(source, METHODS[name](it, edits, 0, strengths), len(strengths), seed))


def _judged(pictures: torch.Tensor, source: Scene, edit: Edit) -> tuple[float, float]:
    reached = [edit_reached(edit, source, measured(picture.numpy(), source)) for picture in pictures]
    distances = pixel_distances(pictures)
    off = float(np.abs(np.subtract(reached, EVEN)).mean())
    return off, delta_smooth(distances.adjacent, distances.skipping)


def _mean(sweeps: Sequence[ImageDistances]) -> ImageDistances:
    """Of the sweeps, each scaled so that what changes in all is 1."""
    adjacent = np.mean([np.divide(one.adjacent, sum(one.adjacent)) for one in sweeps], 0).tolist()
    return ImageDistances("the mean of several", tuple(adjacent), (), (0.0, *np.cumsum(adjacent).tolist()))


if __name__ == "__main__":
    main()
