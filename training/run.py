"""A training run from its config to its adapter file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from slider_core.adapters.strength_projector import ProjectorBundle

from .callbacks import Watching
from .checkpoints import Checkpoints
from .collate import micro_batches
from .comfyui import model_file
from .config import Config
from .errors import TrainingError
from .examples import Example, Examples, Picture, read_examples
from .export import SIGN, write_adapter
from .frozen_model import BaseModel
from .objectives import FlowMatching, Objective, Sample, Suppression
from .optimizer import average, optimiser, schedule
from .sample_cache import Progress, Prompt, SampleCache
from .trainable import Tensors, TrainableLora, TrainableProjector
from .validation import Slider

PACK_VERSION = "0.1.0"
_KINDS = {"stlora": "STLoRA", "gstlora": "GSTLoRA", "projector": "GSTLoRA"}
_FREE_TO_CHANGE = {"output", "cache", "samples", "checkpoints", "watching"}
_FREE = {
    *("run.steps", "run.micro_batch", "run.checkpointing", "base.comfyui", "base.models", "base.cpu"),
    *("data.images", "data.path"),  # what they hold is part of the data's hash
}
_CHANGED_WITH_CARE = {"optimiser.learning_rate", "base.weight_dtype"}
"""What a run that has broken off may have to go on with."""
_LOG = logging.getLogger(__name__)


class Learning(torch.nn.Module):
    """All that learns in a run."""

    def __init__(self, config: Config, base: BaseModel):
        super().__init__()
        self.lora = TrainableLora(base, _KINDS[config.method], config.adapter.rank, config.run.seed)
        self.projector: TrainableProjector | None = None
        if config.method == "projector":
            self.projector = TrainableProjector(base, config.run.seed)

    def tensors(self) -> Tensors:
        return {**self.lora.tensors(), **(self.projector.tensors() if self.projector else {})}


def objective_of(config: Config, learning: Learning) -> Objective:
    if learning.projector is not None:
        return FlowMatching(config.objective, config.run.seed, learning.lora, learning.projector)
    partial = config.objective.kind == "pps"
    return Suppression(config.objective, config.run.seed, learning.lora, partial)


class Run:
    """A run that can be stopped at any time and goes on where its last checkpoint is."""

    def __init__(
        self, config: Config, accelerator: Accelerator, on_progress: Progress, most_examples: int | None = None
    ):
        self.config, self.accelerator = config, accelerator
        file = model_file("diffusion_models", config.base.model)
        self.base = BaseModel.load(file, config.base.weight_dtype, config.run.checkpointing)
        self.cache = SampleCache(
            config.cache_folder, config.base, config.run.resolution, self.base.dtype, self.base.family.context_encoder
        )
        self.learning = Learning(config, self.base)
        self.objective = objective_of(config, self.learning)
        with accelerator.main_process_first():
            self._prepare(on_progress, most_examples)
        self.base.to_device(config.run.micro_batch, self.tokens)
        self.optimiser = optimiser(config.optimiser, self.learning.parameters())
        self.schedule = schedule(config.optimiser, self.optimiser, config.run.steps)
        self.average = average(config.optimiser, self.learning)
        self.checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoints.keep)
        self.step = 0
        self.asked_to_stop = False
        self.stopped = False
        self._unsaved = False

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one. Raises TrainingError when it is of another run."""
        found = self.checkpoints.newest()
        if found is None:
            return
        self.step, state = found
        self._check_same_run(state["settings"])
        self.learning.load_state_dict(state["learning"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self._use_learning_rate()
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        _LOG.info("Going on from step %d.", self.step)

    def train(self, watching: Watching) -> None:
        """Take the remaining steps; after Ctrl-C, or when told to end, the step is finished and saved."""
        if self.step >= self.config.run.steps:  # the last checkpoint may be there without its adapter
            self._save(last=True)
        with _stops(self):
            while self.step < self.config.run.steps and not self.stopped:
                losses, norm = self.take_step()
                self.step += 1
                last = self.stopped or self.step == self.config.run.steps
                self._unsaved |= self.step % self.config.checkpoints.every == 0 or last
                if self._unsaved:
                    self._save(last)
                watching.step(self, losses, norm)
        watching.end(self)

    def take_step(self) -> tuple[float, float]:
        """One step of the optimiser over all processes. Returns the mean loss and the norm of the gradients."""
        parameters = list(self.learning.parameters())
        share = 1 / self.config.run.batch
        total = torch.zeros((), device=self.base.device)
        try:
            for batch in micro_batches(self._own_samples(), self.cache, self.base, self.config.run.micro_batch):
                total += self.objective.learn(self.base, batch, share).sum() * share
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{self.base.device} has not enough memory for a step. Set run.micro_batch to 1, run.checkpointing to "
                "true, or base.weight_dtype to float8_e4m3fn, and start again: it goes on from the last checkpoint. Or "
                "begin a run with a smaller run.resolution."
            ) from error
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), total[None], total.new_tensor([self.asked_to_stop])])
        flat = self.accelerator.reduce(flat, reduction="sum")
        *gradients, loss, stopped = flat.split([*(p.numel() for p in parameters), 1, 1])
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.view_as(parameter)
        self.stopped = bool(stopped)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optimiser.clip_norm)
        if not (loss.isfinite().all() and norm.isfinite()):
            raise TrainingError(
                f"The loss at step {self.step + 1} is not finite; nothing was changed by it. Lower the learning rate, "
                "or choose base.weight_dtype bfloat16, and start again: it goes on from the last checkpoint."
            )
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.learning)
        return loss.item(), norm.item()

    @property
    def result(self) -> Learning:
        """What learns, averaged over time if the config wants that."""
        averaged = self.learning if self.average is None else self.average.module
        assert isinstance(averaged, Learning)
        return averaged

    def slider(self) -> Slider:
        """The adapter as it is now, as the nodes would read it from its file."""
        adapter = self.result.lora.adapter(self.config.name)
        if self.result.projector is None:
            return adapter
        return ProjectorBundle(self.result.projector.projector, adapter)

    def write_adapter(self, file: Path) -> None:
        """The adapter as it is now."""
        write_adapter(file, self.result.tensors(), self.metadata())

    def metadata(self) -> dict[str, Any]:
        """What an adapter's file tells of its making."""
        config, lora = self.config, self.learning.lora
        return {
            "method": config.method,
            "objective": config.objective.kind,
            "base": self.base.family.name,
            "base file": config.base.model,
            "rank": config.adapter.rank,
            "targets": sorted({layer.split(".", 2)[2] for layers in lora.layers.values() for layer in layers}),
            "sign": SIGN if config.method != "projector" else "strength 0 to 1",
            "spans": "character ranges of ComfyUI's tokenization",
            "text rows": config.base.text_rows,
            "dataset": self.dataset_hash(),
            "steps": self.step,
            "pack version": PACK_VERSION,
        }

    def dataset_hash(self) -> str:
        """Tells data sets apart, wherever they lie."""
        told = [
            (
                example.source.file.name,
                example.source.column,
                example.instructions,
                [(target.picture.column, round(target.strength, 6)) for target in example.targets],
            )
            for example in self.examples.training
        ]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def _own_samples(self) -> Sequence[Sample]:
        samples = self.objective.samples(self.examples.training, self.step, self.config.run.batch)
        return samples[self.accelerator.process_index :: self.accelerator.num_processes]

    def _prepare(self, on_progress: Progress, most: int | None) -> None:
        """Have the examples, with everything that is needed of them in the cache; those with bad pictures left out."""
        self.all_examples = read_examples(self.config)
        examples = Examples(*(part[:most] for part in self.all_examples))
        bad = self.cache.fill_latents(_pictures([*examples.training, *examples.held_out]), on_progress)
        for picture, reason in bad.items():
            _LOG.warning("%s is left out: %s", picture.file, reason)
        training, held_out = (
            [example for example in part if not bad.keys() & set(_pictures([example]))] for part in examples
        )
        if not training:
            raise TrainingError(f"None of the pictures can be read, such as {next(iter(bad)).file}.")
        self.examples = Examples(training, held_out)
        self.cache.fill_texts(self._prompts(), on_progress)

    def _prompts(self) -> Iterator[Prompt]:
        config = self.config.run
        yield from self.objective.prompts(self.examples.training, config.steps, config.batch)
        for example in self.examples.held_out:
            yield example.instructions

    @property
    def tokens(self) -> int:
        """Rows of text and of pictures in one sample."""
        rows = self.cache.prompt(self.examples.training[0].instructions).text.states.shape[1]
        shape = self.cache.latent(self.examples.training[0].source).shape
        return rows + 2 * self.base.family.image_tokens(shape)

    def _save(self, last: bool) -> None:
        """Write checkpoint and adapter; while the disk is full, go on and try again after the next step."""
        if not self.accelerator.is_main_process:
            self._unsaved = False
            return
        state = {
            "settings": self._settings(),
            "learning": self.learning.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
        }
        try:
            self.checkpoints.save(self.step, state)
            self.write_adapter(self.config.output / f"{self.config.name}.safetensors")
            self._unsaved = False
        except OSError as error:
            kept = f"the last whole checkpoint is of step {(self.checkpoints.steps or [0])[-1]}"
            if last:
                raise TrainingError(
                    f"Step {self.step} cannot be written to {self.config.output} ({error.strerror}); {kept}. Make room "
                    "and start the same command again: it goes on from there."
                ) from error
            _LOG.warning("Step %d cannot be written (%s); %s. Make room: it is tried again.", self.step, error, kept)

    def _settings(self) -> str:
        settings = {**self.config.model_dump(mode="json", exclude=_FREE_TO_CHANGE), "dataset": self.dataset_hash()}
        return json.dumps({name: value for name, value in _flat(settings).items() if name not in _FREE}, sort_keys=True)

    def _check_same_run(self, found: str) -> None:
        """A setting that the checkpoint does not know is newer than it."""
        before, now = _flat(json.loads(found)), json.loads(self._settings())
        changed = [key for key in before if key in now and before[key] != now[key]]
        told = "; ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in sorted(changed))
        if set(changed) - _CHANGED_WITH_CARE:
            raise TrainingError(
                f"{self.config.output} holds a run with other settings: {told}. Change them back to go on with it, or "
                "choose another output folder."
            )
        if changed:
            _LOG.warning("Going on with other settings: %s.", told)

    def _use_learning_rate(self) -> None:
        """That of the config, where the optimiser has come with that of its checkpoint."""
        wanted = self.config.optimiser.learning_rate
        for group, before in zip(self.optimiser.param_groups, self.schedule.base_lrs):
            group["lr"] *= wanted / before
            group["initial_lr"] = wanted
        self.schedule.base_lrs = [wanted] * len(self.schedule.base_lrs)


def _pictures(examples: Sequence[Example]) -> list[Picture]:
    return [
        picture for example in examples for picture in (example.source, *(target.picture for target in example.targets))
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, part in tree.items()
        for name, value in _flat(part, f"{prefix}.{key}" if prefix else key).items()
    }


@contextlib.contextmanager
def _stops(run: Run) -> Iterator[None]:
    """Ctrl-C and a polite end finish the step and save; a second one ends at once."""

    def stop(number: int, frame: object) -> None:
        run.asked_to_stop = True
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
