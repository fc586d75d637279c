"""python -m training.miniature: train the miniature edit model from scratch and evaluate it."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from slider_core.errors import SliderError

from ..comfyui import use_comfyui
from ..errors import TrainingError

MODELS = Path(__file__).resolve().parents[2] / "demo" / "miniature"
OUTPUT = Path(__file__).resolve().parents[2] / "training-output" / "miniature"
DATASET, LAYERS = OUTPUT / "dataset", OUTPUT / "layers"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m training.miniature", description=__doc__)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--threads", type=int, help="number of CPU threads; default: all")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in _PARTS.items():
        part = commands.add_parser(name, help=f"train {description}; resumes an interrupted run")
        part.add_argument("folder", type=Path, help="for checkpoints, loss curves and training samples")
        part.add_argument("--steps", type=int, help="total number of steps; default: as for the shipped weights")
    commands.add_parser("write", help="write the trained parts as files for ComfyUI").add_argument("folder", type=Path)
    dataset = commands.add_parser("dataset", help="write the training data of the adapters")
    dataset.add_argument("folder", type=Path, nargs="?", default=DATASET)
    evaluate = commands.add_parser("evaluate", help="evaluate the model on validation scenes")
    evaluate.add_argument("--scenes", type=int, default=200)
    layers = commands.add_parser("layers", help="find the vital layers of the model")
    layers.add_argument("folder", type=Path, nargs="?", default=LAYERS)
    layers.add_argument("--scenes", type=int, default=40)
    for command in commands.choices.values():
        command.add_argument("--models", type=Path, default=MODELS, help="a ComfyUI models folder")
    args = parser.parse_args(arguments)
    use_comfyui(args.comfyui, cpu=True)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("training").setLevel(logging.INFO)
    try:
        return _run(args)
    except (TrainingError, SliderError) as error:
        print(error, file=sys.stderr)
        return 1


_PARTS = {
    "text": "the text encoders (minutes)",
    "decoder": "the autoencoder's decoder (half an hour on two cores)",
    "transformer": "the transformer (hours; after the text encoders)",
}


def _run(args: argparse.Namespace) -> int:
    from . import model
    from .dataset import write_dataset
    from .layer_scores import layer_scores

    if args.command == "dataset":
        write_dataset(args.folder)
    elif args.command == "layers":
        scores = layer_scores(args.models, args.scenes, args.folder)
        print(json.dumps({layer: scores.vitality(layer) for layer in sorted(scores.similarities)}, indent=1))
    elif args.command == "evaluate":
        for num_edits in (1, 2, 3):
            evaluation = model.evaluate(args.models, args.scenes, num_edits)
            print(json.dumps({"num_edits": num_edits, **evaluation._asdict()}, indent=1))
    elif args.command == "write":
        for file in model.write(args.folder, args.models):
            print(f"{file}  {file.stat().st_size / 2**20:.1f} MB")
    else:
        model.train(args.command, args.folder, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
