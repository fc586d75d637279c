"""python -m training: prepare training data, train an adapter, evaluate, inspect and export it."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from slider_core.errors import SliderError

from .comfyui import use_comfyui
from .config import TrainingConfig, read_config
from .errors import TrainingError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an adapter; resumes an interrupted run")
    train.add_argument("config", type=Path)
    train.add_argument(
        "--dry-run", action="store_true", help="check everything and estimate memory, disk space and time; do not train"
    )
    evaluate = commands.add_parser("evaluate", help="render the validation examples of a config with an adapter")
    evaluate.add_argument("config", type=Path)
    evaluate.add_argument("--adapter", type=Path, help="an adapter file; default: the one that the config trains")
    quickstart = commands.add_parser(
        "quickstart", help="write a model with random weights, images and a config, to try the trainer on the CPU"
    )
    quickstart.add_argument("folder", type=Path)
    quickstart.add_argument("--comfyui", type=Path)
    prepare = commands.add_parser("prepare", help="render edits at several strengths to train a strength projector on")
    prepare.add_argument("config", type=Path)
    inspect = commands.add_parser("inspect", help="describe an adapter file")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--comfyui", type=Path)
    export = commands.add_parser("export", help="write an adapter in the format of its paper's code")
    export.add_argument("file", type=Path)
    export.add_argument("folder", type=Path)
    export.add_argument("--comfyui", type=Path)
    given = sys.argv[1:] if arguments is None else arguments
    if list(given[:1]) == ["tryout"]:
        parser.error("'tryout' is now 'quickstart'")
    args = parser.parse_args(given)
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)  # not the root logger: ComfyUI logs much at this level
    try:
        return _COMMANDS[args.command](args)
    except (TrainingError, SliderError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error}. Fix this and start the same command again: finished work is kept.", file=sys.stderr)
        return 1


def _train(args: argparse.Namespace) -> int:
    config = _use_config(args.config)
    from accelerate import Accelerator, InitProcessGroupKwargs

    from .callbacks import ProgressLogger
    from .dry_run import dry_run
    from .run import Run

    if args.dry_run:
        print(dry_run(config, Accelerator(cpu=config.model.cpu), _log_progress))
        return 0
    trackers = [
        *(["tensorboard"] if config.logging.tensorboard else []),
        *(["wandb"] if config.logging.wandb else []),
    ]
    for package in trackers:
        if importlib.util.find_spec(package) is None:
            raise TrainingError(
                f"logging.{package} needs the package {package}: pip install {package}. Or remove the setting."
            )
    # processes wait for the main process while it encodes or renders
    long_timeout = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(
        cpu=config.model.cpu,
        log_with=trackers or None,
        project_dir=str(config.output),
        kwargs_handlers=[long_timeout],
    )
    config.output.mkdir(parents=True, exist_ok=True)
    run = Run.prepare(config, accelerator, _log_progress)
    run.resume()
    run.train([ProgressLogger(config, accelerator, run.render_validation)])
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    config = _use_config(args.config)
    from accelerate import Accelerator

    from .evaluate import evaluate

    folder, summary = evaluate(config, args.adapter, Accelerator(cpu=config.model.cpu), _log_progress)
    print(f"{summary}\n{folder}")
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    use_comfyui(args.comfyui, cpu=True)
    from .quickstart import write_quickstart

    print(f"python -m training train {write_quickstart(args.folder)}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from .data_preparation.config import read_prepare_config
    from .data_preparation.prepare import prepare

    config = read_prepare_config(args.config)
    if config.distance == "lpips":
        use_comfyui(None, cpu=True)
    try:
        print(prepare(config))
    except KeyboardInterrupt:
        print("Interrupted. Finished work is kept; start the same command again to resume.", file=sys.stderr)
        return 130
    return 0


def _inspect(args: argparse.Namespace) -> int:
    use_comfyui(args.comfyui, cpu=True)
    from slider_core.adapters.adapter_file import read_adapter
    from slider_core.adapters.strength_projector import read_projector

    from .export import read_metadata

    metadata = read_metadata(args.file)
    try:
        print(read_projector(args.file).describe())
    except SliderError:
        print(read_adapter(args.file).describe())
    for name, value in metadata.items():
        print(f"{name}: {value}")
    return 0


def _export(args: argparse.Namespace) -> int:
    use_comfyui(args.comfyui, cpu=True)
    from .export import export_adapter

    for file in export_adapter(args.file, args.folder):
        print(file)
    return 0


def _use_config(file: Path) -> TrainingConfig:
    config = read_config(file)
    use_comfyui(config.model.comfyui, config.model.cpu, config.model.extra_models_folder)
    return config


def _log_progress(what: str, done: int, total: int) -> None:
    if done == total or done % 50 == 0:
        logging.getLogger(__name__).info("%s encoded: %d of %d", what, done, total)


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
