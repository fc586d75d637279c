"""Measurements as pictures: (1, height, width, 3), 0 to 1, as ComfyUI's images."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import SliderError

if TYPE_CHECKING:
    from ..stable_flow.attention_maps import PointAttention
    from ..stable_flow.vitality_search import LayerScores

RED, GRAY = "#d1495b", "#8d99ae"
_DPI = 100


def layer_plot(scores: LayerScores, vital: Sequence[int]) -> torch.Tensor:
    """Similarity of the pictures without each layer, as in Stable Flow's figure 4; vital layers marked."""
    layers = sorted(scores.similarities)
    figure = new_figure(11, 5)
    axes = figure.subplots()
    axes.plot(layers, [scores.similarity(layer) for layer in layers], color=GRAY, linewidth=1, zorder=1)
    for chosen, colour, name in ((False, GRAY, "other layers"), (True, RED, "vital layers")):
        shown = [layer for layer in layers if (layer in vital) == chosen]
        axes.scatter(shown, [scores.similarity(layer) for layer in shown], color=colour, label=name, zorder=2)
    pictures = max(len(values) for values in scores.similarities.values())
    axes.set(
        xlabel="layer left out",
        ylabel="similarity to the whole model's picture",
        title=f"Compared by {scores.settings['compared by']}, mean of {pictures} picture(s)",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return figure_image(figure)


def attention_plot(
    attention: PointAttention, picture: torch.Tensor, point: tuple[float, float], vital: Sequence[int]
) -> torch.Tensor:
    """A point's attention in vital and other layers, and the share of text in each; picture: (height, width, 3)."""
    others = [layer for layer in attention.text if layer not in vital]
    figure = new_figure(12, 8)
    panels = figure.subplot_mosaic([["picture", "vital", "other"], ["shares"] * 3], height_ratios=(2, 1))
    height, width = picture.shape[:2]
    panels["picture"].imshow(picture.clamp(0, 1).cpu().numpy())
    panels["picture"].set_title("the point")
    panels["picture"].plot(point[0] * width, point[1] * height, "o", color=RED, markeredgecolor="white")
    for name, layers in (("vital", vital), ("other", others)):
        if layers:
            panels[name].imshow(picture.mean(-1).cpu().numpy(), cmap="gray", extent=(0, width, height, 0))
            shares = attention.map_of(layers).numpy()
            panels[name].imshow(shares, cmap="inferno", alpha=0.75, extent=(0, width, height, 0))
            text, image = attention.share_of_text(layers), attention.share_of_image(layers)
            panels[name].set_title(f"{name} layers: {image:.0%} image, {text:.0%} text")
    for name in ("picture", "vital", "other"):
        panels[name].set_axis_off()
    colours = [RED if layer in vital else GRAY for layer in attention.text]
    panels["shares"].bar(list(attention.text), list(attention.text.values()), color=colours)
    panels["shares"].set(xlabel="layer (vital ones red)", ylabel="share of text", ylim=(0, 1))
    return figure_image(figure)


def curves_plot(
    across: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str
) -> torch.Tensor:
    """Lines over a common axis, the last of them on top."""
    figure = new_figure(9, 5)
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(across, values, label=name, marker="o" if len(values) < 30 else "")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure_image(figure)


def check_matplotlib() -> None:
    """Raise SliderError where nothing can be drawn; to be called before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SliderError(
            "Plots need matplotlib, which is not installed. Install the pack's requirements.txt into ComfyUI's Python."
        )


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def figure_image(figure: Any) -> torch.Tensor:
    """The figure as a ComfyUI IMAGE (1, height, width, 3), 100 pixels per inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]
