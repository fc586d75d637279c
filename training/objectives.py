"""What the adapters are asked to do: PPS and SPPS (SliderEdit), flow matching with a strength (Kontinuous Kontext)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from slider_core.patching.forward_patches import ForwardWrapper

from .config import Objective as Settings
from .examples import Example, Picture
from .frozen_model import BaseModel, Text
from .rng import example_of, generator
from .sample_cache import Prompt
from .trainable import TrainableLora, TrainableProjector

NEUTRAL: Prompt = ("keep the image the same",)
"""What SPPS holds against an instruction."""


class Sample(NamedTuple):
    """One sample of a step, drawn but not read yet.

    clean: what noise is put on. prompt: what the adapted model is told. teacher: what the bare one is told, if it is
    asked. suppressed: places of the instructions in the prompt that the adapter deletes. noise: place of its noise.
    """

    source: Picture
    clean: Picture
    prompt: Prompt
    teacher: Prompt | None
    suppressed: tuple[int, ...]
    strength: float
    dropped: bool
    sigma: float
    noise: tuple[int, int, int]


class Batch(NamedTuple):
    """Samples of one shape on the model's device: source, clean, noise (n, channels, height, width), sigma (n,)."""

    samples: Sequence[Sample]
    source: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    text: Text
    teacher: Text | None
    rows: Sequence[tuple[tuple[int, ...], ...]]

    @property
    def noised(self) -> torch.Tensor:
        sigma = self.sigma[:, None, None, None]
        return (1 - sigma) * self.clean + sigma * self.noise


class Objective(ABC):
    """Draws samples and says how far the adapted model is from what is wanted."""

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.seed = settings, seed

    @abstractmethod
    def draw(self, example: Example, step: int, place: int) -> Sample:
        """The sample that an example gives at a place of a step's batch."""

    def samples(self, examples: Sequence[Example], step: int, batch: int) -> list[Sample]:
        """The samples of a step, over all processes."""
        numbers = range(step * batch, (step + 1) * batch)
        chosen = [examples[example_of(self.seed, number, len(examples))] for number in numbers]
        return [self.draw(example, step, place) for place, example in enumerate(chosen)]

    def prompts(self, examples: Sequence[Example], steps: int, batch: int) -> Iterator[Prompt]:
        """All prompts that so many steps need, some of them several times."""
        for step in range(steps):
            for sample in self.samples(examples, step, batch):
                yield sample.prompt
                if sample.teacher is not None:
                    yield sample.teacher

    @abstractmethod
    def changes(self, batch: Batch) -> Mapping[str, ForwardWrapper]:
        """What the adapter does to the model for this batch."""

    @abstractmethod
    def wanted(self, base: BaseModel, batch: Batch) -> torch.Tensor:
        """The velocity that the adapted model should have, shaped as the latents."""

    def learn(self, base: BaseModel, batch: Batch, share: float) -> torch.Tensor:
        """Add the gradients of share * sum of the samples' losses to what learns; returns the losses, (n,)."""
        wanted = self.wanted(base, batch)
        with base.changed(self.changes(batch)):
            losses = self.distances(self.velocity(base, batch, batch.text), wanted)
            (share * losses.sum()).backward()
        return losses.detach()

    def velocity(self, base: BaseModel, batch: Batch, text: Text) -> torch.Tensor:
        return base.velocity(batch.noised, batch.sigma, text, self.settings.guidance, [batch.source])

    def distances(self, predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Mean per sample of the squared difference, or of Huber's."""
        if self.settings.loss == "huber":
            each = torch.nn.functional.huber_loss(predicted, wanted, reduction="none")
        else:
            each = (predicted - wanted) ** 2
        return each.flatten(1).mean(1)

    def chance(self, step: int, place: int, what: str) -> torch.Generator:
        return generator(self.seed, what, step, place)

    def sigma(self, step: int, place: int) -> float:
        """A noise level, 0 to 1."""
        chance = self.chance(step, place, "sigma")
        if self.settings.timesteps == "uniform":
            return torch.rand((), generator=chance).item()
        normal = torch.randn((), generator=chance) * self.settings.timestep_spread + self.settings.timestep_mean
        return torch.sigmoid(normal).item()


class Suppression(Objective):
    """PPS: with the adapter on some instructions the model should say what it says without them.
    SPPS: with the adapter on the whole prompt, what it says to a neutral one.

    Noise is put on the source picture, which is the reference as well: no edited picture is needed.
    Source: SliderEdit, section 'Training'.
    """

    def __init__(self, settings: Settings, seed: int, lora: TrainableLora, partial: bool):
        super().__init__(settings, seed)
        self.lora, self.partial = lora, partial

    def draw(self, example: Example, step: int, place: int) -> Sample:
        prompt = example.instructions
        suppressed = tuple(range(len(prompt)))
        teacher = NEUTRAL
        if self.partial:
            subsets = 2 ** len(prompt) - 1
            chosen = 1 + int(torch.randint(subsets, (), generator=self.chance(step, place, "suppressed")))
            suppressed = tuple(k for k in suppressed if chosen >> k & 1)
            teacher = tuple(one for k, one in enumerate(prompt) if k not in suppressed)
        return Sample(
            source=example.source,
            clean=example.source,
            prompt=prompt,
            teacher=teacher,
            suppressed=suppressed,
            strength=0.0,
            dropped=False,
            sigma=self.sigma(step, place),
            noise=(self.seed, step, place),
        )

    def changes(self, batch: Batch) -> Mapping[str, ForwardWrapper]:
        if self.lora.kind == "GSTLoRA":
            return self.lora.forward_wrappers(torch.ones((), device=batch.sigma.device))
        scale = torch.zeros(batch.text.states.shape[:2])
        for k, (sample, rows) in enumerate(zip(batch.samples, batch.rows)):
            for instruction in sample.suppressed:
                scale[k, list(rows[instruction])] = 1.0
        return self.lora.forward_wrappers(scale.to(batch.sigma.device))

    def wanted(self, base: BaseModel, batch: Batch) -> torch.Tensor:
        assert batch.teacher is not None
        with torch.no_grad():
            return self.velocity(base, batch, batch.teacher)


class FlowMatching(Objective):
    """The edit at a strength as the model should make it: velocity noise - edit(s), from the source as reference.

    The strength is left out of some samples, so that the LoRA learns to do without. Source: Kontinuous Kontext, 3.
    """

    def __init__(self, settings: Settings, seed: int, lora: TrainableLora, projector: TrainableProjector):
        super().__init__(settings, seed)
        self.lora, self.projector = lora, projector

    def draw(self, example: Example, step: int, place: int) -> Sample:
        chance = self.chance(step, place, "strength")
        target = example.targets[int(torch.randint(len(example.targets), (), generator=chance))]
        return Sample(
            source=example.source,
            clean=target.picture,
            prompt=example.instructions,
            teacher=None,
            suppressed=(),
            strength=target.strength,
            dropped=torch.rand((), generator=chance).item() < self.settings.strength_dropout,
            sigma=self.sigma(step, place),
            noise=(self.seed, step, place),
        )

    def prompts(self, examples: Sequence[Example], steps: int, batch: int) -> Iterator[Prompt]:
        return (example.instructions for example in examples)

    def changes(self, batch: Batch) -> Mapping[str, ForwardWrapper]:
        strengths = [sample.strength for sample in batch.samples]
        dropped = [sample.dropped for sample in batch.samples]
        return {
            **self.lora.forward_wrappers(torch.ones((), device=batch.sigma.device)),
            **self.projector.forward_wrappers(strengths, batch.text.pooled, dropped),
        }

    def wanted(self, base: BaseModel, batch: Batch) -> torch.Tensor:
        return batch.noise - batch.clean
