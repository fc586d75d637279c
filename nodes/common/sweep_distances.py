"""By what the pictures of a sweep are compared."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io

from ...slider_core.errors import SliderError
from ...slider_core.metrics.image_distance import ImageDistances, feature_distances, latent_distances, pixel_distances
from ...slider_core.metrics.perceptual_distance import dreamsim_distances, lpips_distances

SEEN, LATENT, LPIPS, DREAMSIM = "clip_vision or pixels", "latent", "LPIPS", "DreamSim"


def distance_inputs() -> tuple[io.Combo.Input, io.Latent.Input]:
    """'distance' and 'latent', for sweep_distances."""
    return (
        io.Combo.Input(
            "distance",
            options=[SEEN, LATENT, LPIPS, DREAMSIM],
            default=SEEN,
            optional=True,
            tooltip="clip_vision or pixels: pixels where clip_vision is not linked. latent: what the sampler made. "
            "LPIPS, DreamSim: as people find pictures different; they need the package of that name and its weights on "
            "this computer.",
        ),
        io.Latent.Input("latent", optional=True, tooltip="The sweep's latents, for the distance of that name."),
    )


def sweep_distances(
    images: torch.Tensor, vision: ClipVisionModel | None, distance: str, latent: dict | None, source: int
) -> ImageDistances:
    """By the choice of distance_inputs."""
    if distance == LPIPS:
        return lpips_distances(images, source)
    if distance == DREAMSIM:
        return dreamsim_distances(images, Path(folder_paths.models_dir, "dreamsim"), source)
    if distance == LATENT:
        return latent_distances(_latents(latent, len(images)), source)
    return pixel_distances(images, source) if vision is None else feature_distances(images, vision, source)


def _latents(latent: dict | None, images: int) -> torch.Tensor:
    if latent is None:
        raise SliderError(
            f"The distance is {LATENT!r}, but none is linked; expected the sweep's latents, from its sampler. Link "
            "them, or choose another distance."
        )
    found = len(latent["samples"])
    if found != images:
        raise SliderError(f"There are {found} latents and {images} pictures; expected those of the same sweep.")
    return latent["samples"]
