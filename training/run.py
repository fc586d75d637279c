"""A training run, from its config to its adapter file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from slider_core.adapters.strength_projector import ProjectorBundle

from .callbacks import Callback, StepReport
from .checkpoints import Checkpoints
from .collate import micro_batches
from .comfyui import model_file
from .config import TrainingConfig
from .errors import TrainingError
from .examples import Example, Examples, ImageFile, read_examples
from .export import STRENGTH_MEANING, write_adapter
from .frozen_model import FrozenModel
from .objectives import FlowMatching, Objective, PromptSuppression, TrainingSample
from .optimizer import build_ema, build_lr_scheduler, build_optimizer
from .sample_cache import Progress, Prompt, SampleCache
from .strict_config import RENAMED_VALUES, current_path
from .trainable import Tensors, TrainableLora, TrainableProjector
from .validation import Slider, StrengthCurve, ValidationRenderer

_ADAPTER_TYPES = {"stlora": "STLoRA", "gstlora": "GSTLoRA", "projector": "GSTLoRA"}
"""A projector's LoRA is trained on the same linears as a GSTLoRA."""
_IGNORED_SECTIONS = {"output", "cache", "validation", "checkpoints", "logging"}
_IGNORED_KEYS = {
    *("run.steps", "run.micro_batch_size", "run.gradient_checkpointing"),
    *("model.comfyui", "model.extra_models_folder", "model.cpu"),
    *("data.images", "data.path"),  # the dataset hash covers their content
}
"""Settings that may differ when a run is resumed."""
_CHANGED_WITH_WARNING = {"optimizer.learning_rate", "model.weight_dtype"}
"""Settings that may differ too, because error messages advise changing them."""
_FORMER_STATE_KEYS = {
    "learning": "trainables",
    "optimiser": "optimizer",
    "schedule": "lr_scheduler",
    "average": "ema",
}
"""Keys in checkpoints of earlier versions -> their current names."""
_LOG = logging.getLogger(__name__)


class Trainables(torch.nn.Module):
    """All trainable parameters of a run."""

    def __init__(self, config: TrainingConfig, model: FrozenModel):
        super().__init__()
        self.lora = TrainableLora(model, _ADAPTER_TYPES[config.method], config.adapter.rank, config.run.seed)
        self.projector: TrainableProjector | None = None
        if config.method == "projector":
            self.projector = TrainableProjector(model, config.run.seed)

    def tensors(self) -> Tensors:
        return {**self.lora.tensors(), **(self.projector.tensors() if self.projector else {})}


def build_objective(config: TrainingConfig, trainables: Trainables) -> Objective:
    if trainables.projector is not None:
        return FlowMatching(config.objective, config.run.seed, trainables.lora, trainables.projector)
    partial = config.objective.type == "pps"
    return PromptSuppression(config.objective, config.run.seed, trainables.lora, partial)


class Run:
    """A training run that can be interrupted at any time and resumes from its last checkpoint.

    all_examples: of the config. examples: those that are used, without unreadable images and beyond any limit.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, model: FrozenModel, cache: SampleCache):
        self.config, self.accelerator, self.model, self.cache = config, accelerator, model, cache
        self.trainables = Trainables(config, model)
        self.objective = build_objective(config, self.trainables)
        self.optimizer = build_optimizer(config.optimizer, self.trainables.parameters())
        self.lr_scheduler = build_lr_scheduler(config.optimizer, self.optimizer, config.run.steps)
        self.ema = build_ema(config.optimizer, self.trainables)
        self.checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoints.keep_last)
        self.all_examples = self.examples = Examples([], [])
        self.step = 0
        self.stop_requested = False
        self.stopped = False
        self._unsaved = False

    @classmethod
    def prepare(
        cls, config: TrainingConfig, accelerator: Accelerator, on_progress: Progress, max_examples: int | None = None
    ) -> Run:
        """Load the model and encode the examples, at most `max_examples` each for training and validation."""
        file = model_file("diffusion_models", config.model.diffusion_model)
        model = FrozenModel.load(file, config.model.weight_dtype, config.run.gradient_checkpointing)
        encoder = model.family.context_encoder
        cache = SampleCache(config.cache_folder, config.model, config.run.resolution, model.dtype, encoder)
        run = cls(config, accelerator, model, cache)
        with accelerator.main_process_first():
            run.encode_examples(on_progress, max_examples)
        run.load_model()
        return run

    def encode_examples(self, on_progress: Progress, max_examples: int | None = None) -> None:
        """Read the examples and encode their images and prompts into the cache. Skips unreadable images.

        Raises TrainingError when no example is left.
        """
        self.all_examples = read_examples(self.config)
        examples = Examples(*(part[:max_examples] for part in self.all_examples))
        unreadable = self.cache.fill_latents(_images_of([*examples.training, *examples.validation]), on_progress)
        for image, reason in unreadable.items():
            _LOG.warning("%s is skipped: %s", image.file, reason)
        training, validation = (
            [example for example in part if not unreadable.keys() & set(_images_of([example]))] for part in examples
        )
        if not training:
            raise TrainingError(f"None of the images can be read, for example {next(iter(unreadable)).file}.")
        self.examples = Examples(training, validation)
        self.cache.fill_texts(self._prompts(), on_progress)

    def load_model(self) -> None:
        """Load the model to the device, leaving room for a micro-batch."""
        self.model.load_to_device(self.config.run.micro_batch_size, self.num_tokens)

    def resume(self) -> None:
        """Resume from the last checkpoint, if any. Raises TrainingError when it has other settings."""
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            return
        self.step, state = checkpoint
        state = {_FORMER_STATE_KEYS.get(key, key): value for key, value in state.items()}
        self._check_same_run(state["settings"])
        _load_state(self.trainables, state["trainables"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self._use_learning_rate()
        if self.ema is not None:
            _load_state(self.ema, state["ema"])
        _LOG.info("Resuming from step %d.", self.step)

    def train(self, callbacks: Sequence[Callback] = ()) -> None:
        """Take the remaining steps. SIGINT and SIGTERM stop the run after the current step, which is saved."""
        if self.step >= self.config.run.steps:  # interrupted between the last checkpoint and the adapter file
            self._save(last=True)
        with _stop_signals(self):
            while self.step < self.config.run.steps and not self.stopped:
                loss, grad_norm = self.train_step()
                self.step += 1
                last = self.stopped or self.step == self.config.run.steps
                self._unsaved |= self.step % self.config.checkpoints.every_n_steps == 0 or last
                if self._unsaved:
                    self._save(last)
                report = StepReport(self.step, loss, grad_norm, self.optimizer.param_groups[0]["lr"])
                for callback in callbacks:
                    callback.on_step_end(report)
        for callback in callbacks:
            callback.on_train_end()

    def train_step(self) -> tuple[float, float]:
        """One optimizer step over all processes. Returns the mean loss and the gradient norm before clipping."""
        parameters = list(self.trainables.parameters())
        weight = 1 / self.config.run.batch_size
        total = torch.zeros((), device=self.model.device)
        try:
            batches = micro_batches(self._own_samples(), self.cache, self.model, self.config.run.micro_batch_size)
            for batch in batches:
                total += self.objective.accumulate_gradients(self.model, batch, weight).sum() * weight
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{self.model.device} ran out of memory in a training step. Set run.micro_batch_size to 1, "
                "run.gradient_checkpointing to true or model.weight_dtype to float8_e4m3fn, and start again: the run "
                "resumes from the last checkpoint. Or start a new run with a smaller run.resolution."
            ) from error
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), total[None], total.new_tensor([self.stop_requested])])
        flat = self.accelerator.reduce(flat, reduction="sum")
        *gradients, loss, stopped = flat.split([*(p.numel() for p in parameters), 1, 1])
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.view_as(parameter)
        self.stopped = bool(stopped)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm)
        if not (loss.isfinite().all() and grad_norm.isfinite()):
            raise TrainingError(
                f"The loss or gradient of step {self.step + 1} is not finite; the step was not applied. Lower "
                "optimizer.learning_rate or set model.weight_dtype to bfloat16, and start again: the run resumes from "
                "the last checkpoint."
            )
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.trainables)
        return loss.item(), grad_norm.item()

    @property
    def averaged(self) -> Trainables:
        """The EMA of the trainable parameters, or the parameters themselves without EMA."""
        trainables = self.trainables if self.ema is None else self.ema.module
        assert isinstance(trainables, Trainables)
        return trainables

    def slider(self) -> Slider:
        """The current adapter, as the nodes read it from its file."""
        adapter = self.averaged.lora.adapter(self.config.name)
        if self.averaged.projector is None:
            return adapter
        return ProjectorBundle(self.averaged.projector.projector, adapter)

    def render_validation(self, folder: Path) -> list[StrengthCurve]:
        """Render the validation examples with the current adapter into a folder."""
        renderer = ValidationRenderer(self.model.patcher, self.cache, self.config.validation)
        curves = renderer.write(self.slider(), self.examples.validation, folder)
        self.load_model()
        return curves

    def write_adapter(self, file: Path) -> None:
        """Write the current adapter."""
        write_adapter(file, self.averaged.tensors(), self.metadata())

    def metadata(self) -> dict[str, Any]:
        """The metadata in the adapter file."""
        config, lora = self.config, self.trainables.lora
        return {
            "method": config.method,
            "objective": config.objective.type,
            "model": self.model.family.name,
            "model_file": config.model.diffusion_model,
            "rank": config.adapter.rank,
            "target_modules": sorted(
                {name.split(".", 2)[2] for modules in lora.peft_modules.values() for name in modules}
            ),
            "strength_meaning": STRENGTH_MEANING if config.method != "projector" else "strength 0 to 1",
            "spans": "character ranges of ComfyUI's tokenization",
            "max_sequence_length": config.model.max_sequence_length,
            "dataset_hash": self.dataset_hash(),
            "steps": self.step,
            "pack_version": pack_version(),
        }

    def dataset_hash(self) -> str:
        """Identifies the training examples, independent of the folder they are in."""
        content = [
            (
                example.source.file.name,
                example.source.column,
                example.instructions,
                [(target.image.column, round(target.strength, 6)) for target in example.targets],
            )
            for example in self.examples.training
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def _own_samples(self) -> Sequence[TrainingSample]:
        """The samples of the step that belong to this process."""
        samples = self.objective.make_samples(self.examples.training, self.step, self.config.run.batch_size)
        return samples[self.accelerator.process_index :: self.accelerator.num_processes]

    def _prompts(self) -> Iterator[Prompt]:
        config = self.config.run
        yield from self.objective.prompts(self.examples.training, config.steps, config.batch_size)
        for example in self.examples.validation:
            yield example.instructions

    @property
    def num_tokens(self) -> int:
        """Number of text and image tokens of a sample: text, noised latent and reference latent."""
        text_tokens = self.cache.prompt(self.examples.training[0].instructions).text.states.shape[1]
        shape = self.cache.latent(self.examples.training[0].source).shape
        return text_tokens + 2 * self.model.family.image_tokens(shape)

    def _save(self, last: bool) -> None:
        """Write checkpoint and adapter. If that fails, warn and retry after the next step; raise after the last."""
        if not self.accelerator.is_main_process:
            self._unsaved = False
            return
        state = {
            "settings": self._settings(),
            "trainables": self.trainables.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
        }
        try:
            self.checkpoints.save(self.step, state)
            self.write_adapter(self.config.output / f"{self.config.name}.safetensors")
            self._unsaved = False
        except OSError as error:
            kept = f"the last complete checkpoint is of step {(self.checkpoints.steps or [0])[-1]}"
            if last:
                raise TrainingError(
                    f"Step {self.step} cannot be written to {self.config.output} ({error.strerror}); {kept}. Free disk "
                    "space and start the same command again: the run resumes from there."
                ) from error
            _LOG.warning(
                "Step %d cannot be written (%s); %s. Free disk space: the next step tries again.",
                self.step,
                error,
                kept,
            )

    def _settings(self) -> str:
        """The settings that must not change when the run is resumed, as JSON: path of the key -> value."""
        settings = {**self.config.model_dump(mode="json", exclude=_IGNORED_SECTIONS), "dataset": self.dataset_hash()}
        kept = {key: value for key, value in _flatten(settings).items() if key not in _IGNORED_KEYS}
        return json.dumps(kept, sort_keys=True)

    def _check_same_run(self, settings: str) -> None:
        """Compare with the settings in a checkpoint. Settings that it does not contain are newer than it."""
        before, now = _current_settings(json.loads(settings)), json.loads(self._settings())
        changed = [key for key in before if key in now and before[key] != now[key]]
        changes = "; ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in sorted(changed))
        if set(changed) - _CHANGED_WITH_WARNING:
            raise TrainingError(
                f"{self.config.output} contains a run with other settings: {changes}. Restore them to resume it, or "
                "choose another output folder."
            )
        if changed:
            _LOG.warning("Resuming with changed settings: %s.", changes)

    def _use_learning_rate(self) -> None:
        """Replace the learning rate of the checkpoint with that of the config."""
        learning_rate = self.config.optimizer.learning_rate
        for group, before in zip(self.optimizer.param_groups, self.lr_scheduler.base_lrs):
            group["lr"] *= learning_rate / before
            group["initial_lr"] = learning_rate
        self.lr_scheduler.base_lrs = [learning_rate] * len(self.lr_scheduler.base_lrs)


def pack_version() -> str:
    """The version in pyproject.toml."""
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return version[1] if version else "unknown"


def _load_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict by order: parameters of earlier versions have other names, but the same order."""
    module.load_state_dict(dict(zip(module.state_dict(), state.values(), strict=True)))


def _current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint with the current names of keys and values."""
    renamed = {".".join(current_path(key.split("."))): value for key, value in settings.items()}
    return {
        key: RENAMED_VALUES.get((key, value), value) if isinstance(value, str) else value
        for key, value in renamed.items()
    }


def _images_of(examples: Sequence[Example]) -> list[ImageFile]:
    return [image for example in examples for image in (example.source, *(target.image for target in example.targets))]


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts -> path of keys, joined by dots -> value."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: value
        for key, subtree in tree.items()
        for name, value in _flatten(subtree, f"{path}.{key}" if path else key).items()
    }


@contextlib.contextmanager
def _stop_signals(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets run.stop_requested; the second one has its usual effect."""

    def request_stop(number: int, frame: object) -> None:
        run.stop_requested = True
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {
        number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
