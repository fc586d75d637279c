"""Callbacks of a training run: progress bar, log files, trackers and renderings of the validation examples."""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from tqdm import tqdm

from slider_core.figures.plots import curves_plot

from .config import TrainingConfig
from .examples import tensor_to_pil
from .validation import StrengthCurve

_LOG = logging.getLogger(__name__)
_LOSS_WINDOW = 20
"""Approximate number of steps in the running mean of the loss."""
_FORMER_KEYS = {"gradient norm": "grad_norm", "learning rate": "learning_rate"}
"""Keys in logs of earlier versions -> their current names."""


class StepReport(NamedTuple):
    """A finished optimizer step: its number, counted from 1, mean loss, gradient norm and learning rate."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float


class Callback(Protocol):
    """Called on all processes."""

    def on_step_end(self, report: StepReport) -> None: ...

    def on_train_end(self) -> None: ...


class ProgressLogger:
    """Writes log.jsonl, loss.png, validation/ and validation.png, and logs to the trackers of the config.

    render: renders the validation examples with the current adapter into a folder. Only the main process writes.
    """

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, render: Callable[[Path], Sequence[StrengthCurve]]
    ):
        self.config, self.accelerator, self.render = config, accelerator, render
        self.bar: Any = None
        self.log = config.output / "log.jsonl"
        accelerator.init_trackers(config.logging.wandb or "edit-sliders", {"name": config.name})

    def on_step_end(self, report: StepReport) -> None:
        values = report._asdict()
        step = values.pop("step")
        every = self.config.validation.every_n_steps
        if self.accelerator.is_main_process:
            if self.bar is None:
                self.bar = tqdm(total=self.config.run.steps, initial=step - 1, unit="step", dynamic_ncols=True)
            self.bar.set_postfix(loss=f"{report.loss:.4g}", refresh=False)
            self.bar.update()
            try:
                self.accelerator.log(values, step=step)
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
                if every and step % every == 0:
                    self._validate(step)
            except OSError as error:
                _LOG.warning("Logs and images cannot be written to %s (%s).", self.config.output, error)
        self.accelerator.wait_for_everyone()

    def on_train_end(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):
                self._plot()
        self.accelerator.end_training()

    def _validate(self, step: int) -> None:
        curves = self.render(self.config.output / "validation" / f"step_{step:06}")
        for k, curve in enumerate(curves):
            values = {
                f"validation_{k}/{name}": getattr(curve, name) for name in ("first_order", "delta_smooth", "rising")
            }
            self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
        self._plot()

    def _plot(self) -> None:
        """loss.png: loss per step and its running mean. validation.png: smoothness of the sliders over the run."""
        records = read_log(self.log)
        if records:
            losses = [record["loss"] for record in records]
            means = list(accumulate(losses, lambda mean, loss: mean + (loss - mean) / _LOSS_WINDOW))
            plot = curves_plot([r["step"] for r in records], {"loss": losses, "running mean": means}, "step", "loss")
            tensor_to_pil(plot[0]).save(self.config.output / "loss.png")
        by_step = {step: curves for step, curves in read_curves(self.config.output).items() if curves}
        if by_step:
            lines = {
                "fraction of intervals that move away from the source": [_mean(c, "rising") for c in by_step.values()],
                "largest adjacent change, of the total": [_mean(c, "first_order") for c in by_step.values()],
                "largest detour": [_mean(c, "delta_smooth") for c in by_step.values()],
            }
            plot = curves_plot(list(by_step), lines, "step", "mean over validation examples")
            tensor_to_pil(plot[0]).save(self.config.output / "validation.png")


def read_curves(output: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> curves of the validation examples, from the output folder of a run."""
    by_step = {}
    for folder in ("samples", "validation"):  # earlier versions wrote into samples/
        for file in sorted((output / folder).glob("step_*/curves.json")):
            with contextlib.suppress(ValueError):  # truncated file
                by_step[int(file.parent.name.removeprefix("step_"))] = json.loads(file.read_text("utf-8"))
    return dict(sorted(by_step.items()))


def _mean(curves: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of the values that are not None; NaN, a gap in the plot, if there are none."""
    values = [curve[name] for curve in curves if curve[name] is not None]
    return statistics.mean(values) if values else float("nan")


def read_log(file: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl by step. Of steps that were repeated after resuming, only the last record is kept."""
    records: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["step"]] = {_FORMER_KEYS.get(key, key): value for key, value in record.items()}
    return [records[step] for step in sorted(records)]
