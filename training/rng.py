"""Chance that depends on nothing but the seed and the place of a sample: any number of processes, and a run that goes
on after a stop, draw the same."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


def generator(*place: object) -> torch.Generator:
    """A CPU generator of its own for this place, such as (seed, 'noise', step, number in the batch)."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def example_of(seed: int, number: int, examples: int) -> int:
    """Which example the number-th sample of a run is: every epoch has each of them once, in an order of its own."""
    epoch, place = divmod(number, examples)
    return _order(seed, epoch, examples)[place]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, examples: int) -> list[int]:
    return torch.randperm(examples, generator=generator(seed, "epoch", epoch)).tolist()
