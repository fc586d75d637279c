"""Latents of graphs, and the comparison of two results.

Tests compare bit for bit only repetitions of the same computation: a call and its repetition in one process, strength 1
and the bare model (no patch is active), a tensor and its copy or file. All other results are compared with `near`:
rounding depends on the batch size, the number of threads, the alignment of the memory and the CPU's instruction set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .comfy_server import ComfyServer
from .graphs import Graph, Link

GraphBuilder = Callable[[Graph], Link]
"""Adds nodes to a graph and returns the link to their latents."""


def latents(server: ComfyServer, *builders: GraphBuilder) -> list[np.ndarray]:
    """Run all builders' nodes in one graph; the latents of each builder, in the order given."""
    graph = Graph()
    ids = [graph.save(build(graph)) for build in builders]
    result = server.run(graph)
    assert result.ok, result.error
    return [result.latent(node) for node in ids]


def near(a: Any, b: Any) -> bool:
    """Whether two arrays or tensors are equal up to rounding."""
    return bool((abs(a - b) <= 2e-4 + 1e-3 * abs(b)).all())


def differ(a: Any, b: Any) -> bool:
    """Whether two arrays or tensors differ by more than rounding."""
    return float(abs(a - b).max()) > 1e-2
