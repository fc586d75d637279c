"""What came out, and whether two results are the same picture."""

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
    """Equal up to the rounding of batched arithmetic; for arrays and tensors."""
    return bool((abs(a - b) <= 2e-4 + 1e-3 * abs(b)).all())


def far(a: Any, b: Any) -> bool:
    """Different by more than any rounding."""
    return float(abs(a - b).max()) > 1e-2
