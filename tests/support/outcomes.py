"""Results of graphs, and whether two results are the same.

Tests compare bit for bit only what the same computation gave: a call and its repetition in one process, strength 1 and
the bare model (no patch is active), a tensor and its copy or file. All else goes through `near`: rounding differs with
the batch size, the number of threads, the alignment of the memory and the instruction set of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .comfy_server import ComfyServer
from .graphs import Graph, Link

Part = Callable[[Graph], Link]
"""Adds nodes to a graph and returns the link to the latents they make."""


def latents(server: ComfyServer, *parts: Part) -> list[np.ndarray]:
    """Run one graph in which each part samples something; the samples in that order."""
    graph = Graph()
    ids = [graph.save(part(graph)) for part in parts]
    result = server.run(graph)
    assert result.ok, result.error
    return [result.latent(node) for node in ids]


def near(a: Any, b: Any) -> bool:
    """Equal up to rounding; for arrays and tensors."""
    return bool((abs(a - b) <= 2e-4 + 1e-3 * abs(b)).all())


def far(a: Any, b: Any) -> bool:
    """Different by more than any rounding."""
    return float(abs(a - b).max()) > 1e-2
