"""Reads training samples from the cache and collates those of the same shape into batches on the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from .frozen_model import FrozenModel, Text
from .objectives import Batch, TrainingSample
from .rng import generator
from .sample_cache import SampleCache


def micro_batches(
    samples: Sequence[TrainingSample], cache: SampleCache, model: FrozenModel, max_size: int
) -> Iterator[Batch]:
    """Yield the samples in batches of at most `max_size`, each of one shape; each batch is read when it is needed."""
    by_shape: dict[tuple[torch.Size, ...], list[TrainingSample]] = defaultdict(list)
    for sample in samples:
        prompts = [sample.prompt, *([] if sample.teacher is None else [sample.teacher])]
        shapes = [cache.latent(sample.source).shape, *(cache.prompt(prompt).text.states.shape for prompt in prompts)]
        by_shape[tuple(shapes)].append(sample)
    for same_shape in by_shape.values():
        for first in range(0, len(same_shape), max_size):
            yield _collate(same_shape[first : first + max_size], cache, model)


def _collate(samples: Sequence[TrainingSample], cache: SampleCache, model: FrozenModel) -> Batch:
    device = model.device
    source_latent = torch.cat([cache.latent(sample.source) for sample in samples]).to(device)
    target_latent = torch.cat([cache.latent(sample.target_image) for sample in samples]).to(device)
    shape = source_latent.shape[1:]
    noise = [torch.randn(shape, generator=generator("noise", *sample.noise_key)) for sample in samples]
    prompts = [cache.prompt(sample.prompt) for sample in samples]
    teachers = [cache.prompt(sample.teacher).text for sample in samples if sample.teacher is not None]
    return Batch(
        samples=samples,
        source_latent=model.scale_latent(source_latent),
        target_latent=model.scale_latent(target_latent),
        noise=torch.stack(noise).to(device),
        sigma=torch.tensor([sample.sigma for sample in samples], device=device),
        text=_cat([prompt.text for prompt in prompts]),
        teacher=_cat(teachers) if teachers else None,
        tokens=[prompt.tokens for prompt in prompts],
    )


def _cat(texts: Sequence[Text]) -> Text:
    return Text(torch.cat([text.states for text in texts]), torch.cat([text.pooled for text in texts]))
