"""Stable Flow's figures: how vital each layer is, and where the attention of a point goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..figures.plots import GRAY, RED, figure_image, new_figure
from .attention_maps import AttentionMaps
from .vitality_search import VitalityScores


def vitality_plot(scores: VitalityScores, vital: Sequence[int]) -> torch.Tensor:
    """Similarity of the images without each layer, as in figure 4, with the vital layers in red: (1, h, w, 3)."""
    indices = sorted(scores.similarities)
    figure = new_figure(11, 5)
    axes = figure.subplots()
    axes.plot(indices, [scores.similarity(index) for index in indices], color=GRAY, linewidth=1, zorder=1)
    for is_vital, color, label in ((False, GRAY, "other layers"), (True, RED, "vital layers")):
        group = [index for index in indices if (index in vital) == is_vital]
        axes.scatter(group, [scores.similarity(index) for index in group], color=color, label=label, zorder=2)
    num_images = max(len(values) for values in scores.similarities.values())
    axes.set(
        xlabel="bypassed layer",
        ylabel="similarity to the full model's image",
        title=f"Compared by {scores.settings['compared by']}, mean of {num_images} image(s)",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return figure_image(figure)


def attention_plot(
    maps: AttentionMaps, image: torch.Tensor, point: tuple[float, float], vital: Sequence[int]
) -> torch.Tensor:
    """The point, its mean attention maps in vital and other layers, and the text attention by layer: (1, h, w, 3).

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
