"""python -m training.miniature: make the miniature edit model from nothing, and examine it."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..comfyui import use_comfyui
from ..errors import TrainingError

MODELS = Path(__file__).resolve().parents[2] / "demo" / "miniature"
OUTPUT = Path(__file__).resolve().parents[2] / "training-output" / "miniature"
LESSONS, LAYERS = OUTPUT / "lessons", OUTPUT / "layers"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m training.miniature", description=__doc__)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, told in _PARTS.items():
        part = commands.add_parser(name, help=f"train {told}; goes on where it was stopped")
        part.add_argument("work", type=Path, help="a folder for checkpoints, curves and what is learned from")
        part.add_argument("--steps", type=int, help="how many in all; by default as many as the kept weights took")
    commands.add_parser("write", help="write what was trained as files for ComfyUI").add_argument("work", type=Path)
    lessons = commands.add_parser("lessons", help="write what its adapters learn from")
    lessons.add_argument("folder", type=Path, nargs="?", default=LESSONS)
    examine = commands.add_parser("examine", help="measure what the model does on scenes that it has never seen")
    examine.add_argument("--scenes", type=int, default=200)
    layers = commands.add_parser("layers", help="find its vital layers")
    layers.add_argument("folder", type=Path, nargs="?", default=LAYERS)
    layers.add_argument("--scenes", type=int, default=40)
    for command in commands.choices.values():
        command.add_argument("--models", type=Path, default=MODELS, help="a ComfyUI models folder")
    chosen = parser.parse_args(arguments)
    use_comfyui(chosen.comfyui, cpu=True)
    import torch

    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("training").setLevel(logging.INFO)
    try:
        return _run(chosen)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1


_PARTS = {
    "text": "the text encoders, minutes",
    "decoder": "the autoencoder's decoder, half an hour on two cores",
    "transformer": "the transformer, hours; needs the text encoders",
}


def _run(chosen: argparse.Namespace) -> int:
    from . import model
    from .dataset import write_lessons
    from .layer_scores import layer_scores

    if chosen.command == "lessons":
        write_lessons(chosen.folder)
    elif chosen.command == "layers":
        scores = layer_scores(chosen.models, chosen.scenes, chosen.folder)
        print(json.dumps({layer: scores.vitality(layer) for layer in sorted(scores.similarities)}, indent=1))
    elif chosen.command == "examine":
        for count in (1, 2, 3):
            found = model.examine(chosen.models, chosen.scenes, count)
            print(json.dumps({"edits at once": count, **found._asdict()}, indent=1))
    elif chosen.command == "write":
        for file in model.write(chosen.work, chosen.models):
            print(f"{file}  {file.stat().st_size / 2**20:.1f} MB")
    else:
        model.train(chosen.command, chosen.work, chosen.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
