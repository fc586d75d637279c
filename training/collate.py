"""From drawn samples to tensors on the device: samples of one shape are computed together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from .frozen_model import BaseModel, Text
from .objectives import Batch, Sample
from .rng import generator
from .sample_cache import SampleCache


def micro_batches(samples: Sequence[Sample], cache: SampleCache, base: BaseModel, most: int) -> Iterator[Batch]:
    """The samples in batches of at most `most`, each of one shape, read when their turn comes."""
    by_shape: dict[tuple[torch.Size, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        prompts = [sample.prompt, *([] if sample.teacher is None else [sample.teacher])]
        shapes = [cache.latent(sample.source).shape, *(cache.prompt(one).text.states.shape for one in prompts)]
        by_shape[tuple(shapes)].append(sample)
    for alike in by_shape.values():
        for first in range(0, len(alike), most):
            yield _read(alike[first : first + most], cache, base)


def _read(samples: Sequence[Sample], cache: SampleCache, base: BaseModel) -> Batch:
    device = base.device
    source = base.latent(torch.cat([cache.latent(sample.source) for sample in samples]).to(device))
    clean = base.latent(torch.cat([cache.latent(sample.clean) for sample in samples]).to(device))
    noise = [torch.randn(source.shape[1:], generator=generator("noise", *sample.noise)) for sample in samples]
    prompts = [cache.prompt(sample.prompt) for sample in samples]
    teachers = [cache.prompt(sample.teacher).text for sample in samples if sample.teacher is not None]
    return Batch(
        samples=samples,
        source=source,
        clean=clean,
        noise=torch.stack(noise).to(device),
        sigma=torch.tensor([sample.sigma for sample in samples], device=device),
        text=_joined([prompt.text for prompt in prompts]),
        teacher=_joined(teachers) if teachers else None,
        rows=[prompt.rows for prompt in prompts],
    )


def _joined(texts: Sequence[Text]) -> Text:
    return Text(torch.cat([text.states for text in texts]), torch.cat([text.pooled for text in texts]))
