"""What can be seen of a run: a bar, TensorBoard or W&B, and everything as files too."""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from tqdm import tqdm

from slider_core.figures.plots import curves_plot

from .config import Config
from .examples import as_picture
from .validation import Renderer

if TYPE_CHECKING:
    from .run import Run

_LOG = logging.getLogger(__name__)
_OVER = 20
"""Steps that the running mean of the loss looks back, about."""


class Watching:
    """Follows a run on the main process: log.jsonl, loss.png, samples/, and the trackers of the config."""

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.bar: Any = None
        self.log = config.output / "log.jsonl"
        accelerator.init_trackers(config.watching.wandb or "edit-sliders", {"name": config.name})

    def step(self, run: Run, loss: float, norm: float) -> None:
        """After every step of the optimiser."""
        rate = run.optimiser.param_groups[0]["lr"]
        values = {"loss": loss, "gradient norm": norm, "learning rate": rate}
        every = self.config.samples.every
        if self.accelerator.is_main_process:
            if self.bar is None:
                self.bar = tqdm(total=self.config.run.steps, initial=run.step - 1, unit="step", dynamic_ncols=True)
            self.bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self.bar.update()
            try:
                self.accelerator.log(values, step=run.step)
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": run.step, **values}) + "\n")
                if every and run.step % every == 0:
                    self._render(run)
            except OSError as error:
                _LOG.warning("%s has no room for logs and pictures (%s).", self.config.output, error)
        self.accelerator.wait_for_everyone()

    def end(self, run: Run) -> None:
        """After the last step."""
        if self.bar is not None:
            self.bar.close()
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):
                self._plot()
        self.accelerator.end_training()

    def _render(self, run: Run) -> None:
        folder = self.config.output / "samples" / f"step_{run.step:06}"
        renderer = Renderer(run.base.patcher, run.cache, self.config.samples)
        curves = renderer.write(run.slider(), run.examples.held_out, folder)
        run.base.to_device(self.config.run.micro_batch, run.tokens)
        for k, found in enumerate(curves):
            values = {
                f"held out {k}/{name}": getattr(found, name) for name in ("first_order", "delta_smooth", "rising")
            }
            self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=run.step)
        self._plot()

    def _plot(self) -> None:
        """loss.png: the loss of each step, and its running mean. held_out.png: how evenly edits come, over the run."""
        records = read_log(self.log)
        if records:
            losses = [record["loss"] for record in records]
            means = list(accumulate(losses, lambda mean, loss: mean + (loss - mean) / _OVER))
            plot = curves_plot([r["step"] for r in records], {"loss": losses, "running mean": means}, "step", "loss")
            as_picture(plot[0]).save(self.config.output / "loss.png")
        seen = {step: found for step, found in read_curves(self.config.output / "samples").items() if found}
        if seen:
            lines = {
                "steps that lead further from the source": [_mean(found, "rising") for found in seen.values()],
                "largest change between neighbours": [_mean(found, "first_order") for found in seen.values()],
                "largest detour": [_mean(found, "delta_smooth") for found in seen.values()],
            }
            plot = curves_plot(list(seen), lines, "step", "held-out examples, mean")
            as_picture(plot[0]).save(self.config.output / "held_out.png")


def read_curves(samples: Path) -> dict[int, list[dict[str, Any]]]:
    """The curves of the held-out examples by step, from the folder of samples."""
    found = {}
    for file in sorted(samples.glob("step_*/curves.json")):
        with contextlib.suppress(ValueError):  # a file that was cut off
            found[int(file.parent.name.removeprefix("step_"))] = json.loads(file.read_text("utf-8"))
    return found


def _mean(curves: Sequence[Mapping[str, Any]], name: str) -> float:
    """NaN, which leaves a gap in a plot, where nothing changed."""
    values = [curve[name] for curve in curves if curve[name] is not None]
    return statistics.mean(values) if values else float("nan")


def read_log(file: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, the last one of each step: after a stop some steps may have been taken twice."""
    records: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["step"]] = record
    return [records[step] for step in sorted(records)]
