"""Plots as ComfyUI IMAGEs: (1, height, width, 3), 0 to 1."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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


def vitality_plot(similarities: Mapping[int, float], vital: Sequence[int], title: str) -> torch.Tensor:
    """Similarity of the images without each layer, with the vital layers in red (Stable Flow, figure 4).

    similarities: layer -> similarity.
    """
    indices = sorted(similarities)
    figure = new_figure(11, 5)
    axes = figure.subplots()
    axes.plot(indices, [similarities[index] for index in indices], color=GRAY, linewidth=1, zorder=1)
    for is_vital, color, label in ((False, GRAY, "other layers"), (True, RED, "vital layers")):
        group = [index for index in indices if (index in vital) == is_vital]
        axes.scatter(group, [similarities[index] for index in group], color=color, label=label, zorder=2)
    axes.set(
        xlabel="bypassed layer",
        ylabel="similarity to the full model's image",
        title=title,
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return figure_image(figure)


class PointAttention(Protocol):
    """Attention of an image point by layer; see stable_flow.attention_maps.AttentionMaps."""

    @property
    def text(self) -> Mapping[int, float]: ...

    def mean_text(self, block_indices: Sequence[int]) -> float: ...

    def mean_image(self, block_indices: Sequence[int]) -> torch.Tensor: ...


def attention_plot(
    maps: PointAttention, image: torch.Tensor, point: tuple[float, float], vital: Sequence[int]
) -> torch.Tensor:
    """The point, its mean attention maps in vital and other layers, and the text attention by layer (figure 6).

    image: (height, width, 3), 0 to 1. point: (x, y), each 0 to 1.
    """
    others = [index for index in maps.text if index not in vital]
    figure = new_figure(12, 8)
    panels = figure.subplot_mosaic([["point", "vital", "other"], ["text"] * 3], height_ratios=(2, 1))
    height, width = image.shape[:2]
    panels["point"].imshow(image.clamp(0, 1).cpu().numpy())
    panels["point"].set_title("the point")
    panels["point"].plot(point[0] * width, point[1] * height, "o", color=RED, markeredgecolor="white")
    for name, indices in (("vital", vital), ("other", others)):
        if indices:
            attention, extent = maps.mean_image(indices), (0, width, height, 0)
            panels[name].imshow(image.mean(-1).cpu().numpy(), cmap="gray", extent=extent)
            panels[name].imshow(attention.numpy(), cmap="inferno", alpha=0.75, extent=extent)
            panels[name].set_title(
                f"{name} layers: {float(attention.sum()):.0%} image, {maps.mean_text(indices):.0%} text"
            )
    for name in ("point", "vital", "other"):
        panels[name].set_axis_off()
    colors = [RED if index in vital else GRAY for index in maps.text]
    panels["text"].bar(list(maps.text), list(maps.text.values()), color=colors)
    panels["text"].set(xlabel="layer (vital layers in red)", ylabel="attention to text", ylim=(0, 1))
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
