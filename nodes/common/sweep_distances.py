"""Distances between the images of a sweep."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy.clip_vision import ClipVisionModel

from ...slider_core.errors import SliderError
from ...slider_core.metrics.image_distance import ImageDistances, feature_distances, latent_distances, pixel_distances
from ...slider_core.metrics.perceptual_distance import dreamsim_distances, lpips_distances

DISTANCES = VISION_OR_PIXELS, LATENT, LPIPS, DREAMSIM = "clip_vision or pixels", "latent", "LPIPS", "DreamSim"


def sweep_distances(
    images: torch.Tensor, vision: ClipVisionModel | None, distance: str, latent: dict | None, source: int
) -> ImageDistances:
    """Distances of `images` by one of DISTANCES. source: index of the image nearest to the source.

    Raises SliderError if the distance is 'latent' and there is not one latent per image.
    """
    if distance == LPIPS:
        return lpips_distances(images, source)
    if distance == DREAMSIM:
        return dreamsim_distances(images, Path(folder_paths.models_dir, "dreamsim"), source)
    if distance == LATENT:
        return latent_distances(_check_latents(latent, len(images)), source)
    return pixel_distances(images, source) if vision is None else feature_distances(images, vision, source)


def _check_latents(latent: dict | None, num_images: int) -> torch.Tensor:
    if latent is None:
        raise SliderError(
            f"The distance is {LATENT!r}, but no latent is linked; expected the sweep's latents from its sampler. Link "
            "them, or choose another distance."
        )
    num_latents = len(latent["samples"])
    if num_latents != num_images:
        raise SliderError(
            f"There are {num_latents} latents and {num_images} images; expected both from the same sweep."
        )
    return latent["samples"]
