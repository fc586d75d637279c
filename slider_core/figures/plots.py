"""Plots as ComfyUI IMAGEs: (1, height, width, 3), 0 to 1."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import SliderError

RED, GRAY = "#d1495b", "#8d99ae"
_DPI = 100


def curves_plot(x: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> torch.Tensor:
    """Curves over common x values; label -> y values. The last curve is on top."""
    figure = new_figure(9, 5)
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(x, values, label=label, marker="o" if len(values) < 30 else "")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure_image(figure)


def check_matplotlib() -> None:
    """Raise SliderError when matplotlib is not installed. Call it before a long computation that ends in a plot."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SliderError(
            "Plots need matplotlib, which is not installed. Install this pack's requirements.txt into ComfyUI's Python."
        )


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure; width, height: inches, 100 pixels each."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def figure_image(figure: Any) -> torch.Tensor:
    """A matplotlib Figure as an IMAGE."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]
