"""Training objectives: partial prompt suppression (PPS) and simplified PPS (SPPS) of SliderEdit ('Training'), and flow
matching with a strength (Kontinuous Kontext, 3).

x_sigma = (1 - sigma) x + sigma noise; v is the velocity, noise - data; c is the source image (reference latent).
L is the mean squared error or the Huber loss, over all elements of the latent.

PPS   L(v_adapter(x_sigma, prompt), v_frozen(x_sigma, prompt without the suppressed instructions))
      x = c; the adapter acts on the text tokens of the suppressed instructions
SPPS  L(v_adapter(x_sigma, prompt), v_frozen(x_sigma, "keep the image the same"))
      x = c; the adapter acts on all tokens
flow  L(v_adapter(x_sigma, prompt, s), noise - x)
      x = the edited image at strength s
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from slider_core.patching.forward_patches import ForwardWrapper

from .config import ObjectiveConfig
from .examples import Example, ImageFile
from .frozen_model import FrozenModel, Text
from .rng import example_index, generator
from .sample_cache import Prompt
from .trainable import TrainableLora, TrainableProjector

NEUTRAL_PROMPT: Prompt = ("keep the image the same",)
"""The teacher's prompt of SPPS."""


class TrainingSample(NamedTuple):
    """One sample of a step, before its image and prompts are read.

    target_image: the image whose latent is noised. prompt: input of the adapted model. teacher: prompt of the frozen
    model; None where the target velocity is not a prediction. suppressed: indices into `prompt` of the instructions
    that the adapter suppresses. noise_key: key of the noise's generator.
    """

    source: ImageFile
    target_image: ImageFile
    prompt: Prompt
    teacher: Prompt | None
    suppressed: tuple[int, ...]
    strength: float
    strength_dropped: bool
    sigma: float
    noise_key: tuple[int, int, int]


class Batch(NamedTuple):
    """Samples of the same shape, on the model's device.

    source_latent, target_latent, noise: (batch, channels, height, width); sigma: (batch,). tokens: for each sample, for
    each instruction of its prompt, the indices of its text tokens.
    """

    samples: Sequence[TrainingSample]
    source_latent: torch.Tensor
    target_latent: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    text: Text
    teacher: Text | None
    tokens: Sequence[tuple[tuple[int, ...], ...]]

    @property
    def noised_latent(self) -> torch.Tensor:
        sigma = self.sigma[:, None, None, None]
        return (1 - sigma) * self.target_latent + sigma * self.noise


class Objective(ABC):
    """Makes training samples and computes their loss."""

    def __init__(self, config: ObjectiveConfig, seed: int):
        self.config, self.seed = config, seed

    @abstractmethod
    def make_sample(self, example: Example, step: int, batch_index: int) -> TrainingSample:
        """The training sample of an example at this step and index in the batch."""

    def make_samples(self, examples: Sequence[Example], step: int, batch_size: int) -> list[TrainingSample]:
        """All samples of a step, over all processes."""
        numbers = range(step * batch_size, (step + 1) * batch_size)
        chosen = [examples[example_index(self.seed, number, len(examples))] for number in numbers]
        return [self.make_sample(example, step, batch_index) for batch_index, example in enumerate(chosen)]

    def prompts(self, examples: Sequence[Example], steps: int, batch_size: int) -> Iterator[Prompt]:
        """All prompts needed for this many steps, with repetitions."""
        for step in range(steps):
            for sample in self.make_samples(examples, step, batch_size):
                yield sample.prompt
                if sample.teacher is not None:
                    yield sample.teacher

    @abstractmethod
    def forward_wrappers(self, batch: Batch) -> Mapping[str, ForwardWrapper]:
        """The adapter for this batch, as forward wrappers by module path."""

    @abstractmethod
    def target_velocity(self, model: FrozenModel, batch: Batch) -> torch.Tensor:
        """The velocity that the adapted model should predict, shaped like the latents."""

    def accumulate_gradients(self, model: FrozenModel, batch: Batch, weight: float) -> torch.Tensor:
        """Forward and backward pass: add the gradients of weight * sum(losses). Returns the losses, (batch,)."""
        target = self.target_velocity(model, batch)
        with model.patched(self.forward_wrappers(batch)):
            losses = self.losses(self.velocity(model, batch, batch.text), target)
            (weight * losses.sum()).backward()
        return losses.detach()

    def velocity(self, model: FrozenModel, batch: Batch, text: Text) -> torch.Tensor:
        return model.velocity(batch.noised_latent, batch.sigma, text, self.config.guidance, [batch.source_latent])

    def losses(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error or Huber loss of each sample, (batch,)."""
        if self.config.loss == "huber":
            elementwise = torch.nn.functional.huber_loss(predicted, target, reduction="none")
        else:
            elementwise = (predicted - target) ** 2
        return elementwise.flatten(1).mean(1)

    def rng(self, step: int, batch_index: int, purpose: str) -> torch.Generator:
        return generator(self.seed, purpose, step, batch_index)

    def sample_sigma(self, step: int, batch_index: int) -> float:
        """A noise level from 0 to 1, uniform or logit-normal."""
        rng = self.rng(step, batch_index, "sigma")
        if self.config.timestep_sampling == "uniform":
            return torch.rand((), generator=rng).item()
        normal = torch.randn((), generator=rng) * self.config.logit_std + self.config.logit_mean
        return torch.sigmoid(normal).item()


class PromptSuppression(Objective):
    """PPS (partial=True) and SPPS (partial=False) of SliderEdit. No edited images are needed."""

    def __init__(self, config: ObjectiveConfig, seed: int, lora: TrainableLora, partial: bool):
        super().__init__(config, seed)
        self.lora, self.partial = lora, partial

    def make_sample(self, example: Example, step: int, batch_index: int) -> TrainingSample:
        prompt = example.instructions
        suppressed = tuple(range(len(prompt)))
        teacher = NEUTRAL_PROMPT
        if self.partial:
            num_subsets = 2 ** len(prompt) - 1
            subset = 1 + int(torch.randint(num_subsets, (), generator=self.rng(step, batch_index, "suppressed")))
            suppressed = tuple(k for k in suppressed if subset >> k & 1)
            teacher = tuple(instruction for k, instruction in enumerate(prompt) if k not in suppressed)
        return TrainingSample(
            source=example.source,
            target_image=example.source,
            prompt=prompt,
            teacher=teacher,
            suppressed=suppressed,
            strength=0.0,
            strength_dropped=False,
            sigma=self.sample_sigma(step, batch_index),
            noise_key=(self.seed, step, batch_index),
        )

    def forward_wrappers(self, batch: Batch) -> Mapping[str, ForwardWrapper]:
        if self.lora.adapter_type == "GSTLoRA":
            return self.lora.forward_wrappers(torch.ones((), device=batch.sigma.device))
        scale = torch.zeros(batch.text.states.shape[:2])
        for k, (sample, tokens) in enumerate(zip(batch.samples, batch.tokens)):
            for instruction in sample.suppressed:
                scale[k, list(tokens[instruction])] = 1.0
        return self.lora.forward_wrappers(scale.to(batch.sigma.device))

    def target_velocity(self, model: FrozenModel, batch: Batch) -> torch.Tensor:
        assert batch.teacher is not None
        with torch.no_grad():
            return self.velocity(model, batch, batch.teacher)


class FlowMatching(Objective):
    """Flow matching on edits at several strengths (Kontinuous Kontext, 3).

    For a fraction `strength_dropout` of the samples the projector is off, so the LoRA also works without it.
    """

    def __init__(self, config: ObjectiveConfig, seed: int, lora: TrainableLora, projector: TrainableProjector):
        super().__init__(config, seed)
        self.lora, self.projector = lora, projector

    def make_sample(self, example: Example, step: int, batch_index: int) -> TrainingSample:
        rng = self.rng(step, batch_index, "strength")
        target = example.targets[int(torch.randint(len(example.targets), (), generator=rng))]
        return TrainingSample(
            source=example.source,
            target_image=target.image,
            prompt=example.instructions,
            teacher=None,
            suppressed=(),
            strength=target.strength,
            strength_dropped=torch.rand((), generator=rng).item() < self.config.strength_dropout,
            sigma=self.sample_sigma(step, batch_index),
            noise_key=(self.seed, step, batch_index),
        )

    def prompts(self, examples: Sequence[Example], steps: int, batch_size: int) -> Iterator[Prompt]:
        return (example.instructions for example in examples)

    def forward_wrappers(self, batch: Batch) -> Mapping[str, ForwardWrapper]:
        strengths = [sample.strength for sample in batch.samples]
        dropped = [sample.strength_dropped for sample in batch.samples]
        return {
            **self.lora.forward_wrappers(torch.ones((), device=batch.sigma.device)),
            **self.projector.forward_wrappers(strengths, batch.text.pooled, dropped),
        }

    def target_velocity(self, model: FrozenModel, batch: Batch) -> torch.Tensor:
        return batch.noise - batch.target_latent
