"""Stateless random numbers: every draw is seeded by a key such as (seed, "noise", step, batch index).

Results therefore depend neither on the number of processes nor on where a run was resumed. The keys that callers use
are part of the results: changing one changes every run.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the key's repr."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def example_index(seed: int, sample: int, num_examples: int) -> int:
    """Index of the example for the given sample of a run. Each epoch contains every example once, in its own order."""
    epoch, position = divmod(sample, num_examples)
    return _epoch_order(seed, epoch, num_examples)[position]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> list[int]:
    return torch.randperm(num_examples, generator=generator(seed, "epoch", epoch)).tolist()
