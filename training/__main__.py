"""python -m training: train an adapter, prepare pictures for it, look at it, export it."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from .comfyui import use_comfyui
from .config import read_config
from .errors import TrainingError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an adapter; goes on where an earlier run stopped")
    train.add_argument("config", type=Path)
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, estimate memory and time, train nothing"
    )
    evaluate = commands.add_parser("evaluate", help="render the held-out examples of a config with an adapter")
    evaluate.add_argument("config", type=Path)
    evaluate.add_argument("--adapter", type=Path, help="a file; without it, what the config has trained")
    quickstart = commands.add_parser(
        "quickstart", help="make a model of random weights, pictures and a config to try things out"
    )
    quickstart.add_argument("folder", type=Path)
    quickstart.add_argument("--comfyui", type=Path)
    prepare = commands.add_parser("prepare", help="render edits at several strengths, as data for a projector")
    prepare.add_argument("config", type=Path)
    inspect = commands.add_parser("inspect", help="say what an adapter file is")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--comfyui", type=Path)
    export = commands.add_parser("export", help="write an adapter in the layout of its paper's own code")
    export.add_argument("file", type=Path)
    export.add_argument("folder", type=Path)
    export.add_argument("--comfyui", type=Path)
    given = sys.argv[1:] if arguments is None else arguments
    if list(given[:1]) == ["tryout"]:
        parser.error("'tryout' is now 'quickstart'")
    chosen = parser.parse_args(given)
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)  # ComfyUI's own says much at that level
    try:
        return _COMMANDS[chosen.command](chosen)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error}. Start the same command again when that is mended: what is done is kept.", file=sys.stderr)
        return 1


def _train(chosen: argparse.Namespace) -> int:
    config = read_config(chosen.config)
    use_comfyui(config.base.comfyui, config.base.cpu, config.base.models)
    from accelerate import Accelerator, InitProcessGroupKwargs

    from .callbacks import Watching
    from .dry_run import dry_run
    from .run import Run

    if chosen.dry_run:
        print(dry_run(config, Accelerator(cpu=config.base.cpu), _say_progress))
        return 0
    trackers = [
        *(["tensorboard"] if config.watching.tensorboard else []),
        *(["wandb"] if config.watching.wandb else []),
    ]
    for package in trackers:
        if importlib.util.find_spec(package) is None:
            raise TrainingError(
                f"watching.{package} needs the package {package}: pip install {package}. Or leave it out."
            )
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))  # while one process encodes or renders, others wait
    accelerator = Accelerator(
        cpu=config.base.cpu, log_with=trackers or None, project_dir=str(config.output), kwargs_handlers=[patient]
    )
    config.output.mkdir(parents=True, exist_ok=True)
    run = Run(config, accelerator, _say_progress)
    run.resume()
    run.train(Watching(config, accelerator))
    return 0


def _evaluate(chosen: argparse.Namespace) -> int:
    config = read_config(chosen.config)
    use_comfyui(config.base.comfyui, config.base.cpu, config.base.models)
    from accelerate import Accelerator

    from .evaluate import evaluate

    folder, summary = evaluate(config, chosen.adapter, Accelerator(cpu=config.base.cpu), _say_progress)
    print(f"{summary}\n{folder}")
    return 0


def _quickstart(chosen: argparse.Namespace) -> int:
    use_comfyui(chosen.comfyui, cpu=True)
    from .quickstart import write_quickstart

    print(f"python -m training train {write_quickstart(chosen.folder)}")
    return 0


def _prepare(chosen: argparse.Namespace) -> int:
    from .data_preparation.config import read_prepare_config
    from .data_preparation.prepare import prepare

    try:
        print(prepare(read_prepare_config(chosen.config)))
    except KeyboardInterrupt:
        print("Stopped. What is done is kept; the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def _inspect(chosen: argparse.Namespace) -> int:
    use_comfyui(chosen.comfyui, cpu=True)
    from slider_core.adapters.adapter_file import read_adapter
    from slider_core.adapters.strength_projector import read_projector
    from slider_core.errors import SliderError

    from .export import read_metadata

    metadata = read_metadata(chosen.file)
    try:
        print(read_projector(chosen.file).describe())
    except SliderError:
        try:
            print(read_adapter(chosen.file).describe())
        except SliderError as error:
            raise TrainingError(str(error)) from error
    for name, value in metadata.items():
        print(f"{name}: {value}")
    return 0


def _export(chosen: argparse.Namespace) -> int:
    use_comfyui(chosen.comfyui, cpu=True)
    from .export import export

    for file in export(chosen.file, chosen.folder):
        print(file)
    return 0


def _say_progress(what: str, done: int, of: int) -> None:
    if done == of or done % 50 == 0:
        logging.getLogger(__name__).info("%s encoded: %d of %d", what, done, of)


_COMMANDS = {
    "train": _train,
    "prepare": _prepare,
    "evaluate": _evaluate,
    "quickstart": _quickstart,
    "inspect": _inspect,
    "export": _export,
}


if __name__ == "__main__":
    sys.exit(main())
