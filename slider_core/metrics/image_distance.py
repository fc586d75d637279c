"""Distances between the images of a sweep: of pixels, of latents, or of a vision model's features.

With x, y the pixels or latents and f the features:

    root mean square: d(x, y) = sqrt(mean((x - y)^2))
    cosine distance:  d(x, y) = 1 - cosine(f(x), f(y)) = || f(x)/|f(x)| - f(y)/|f(y)| ||^2 / 2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.clip_vision import ClipVisionModel
from torch.nn.functional import interpolate, normalize

from .. import node_names as names
from ..errors import SliderError
from ..vision_features import vision_features


@dataclass(frozen=True)
class ImageDistances:
    """Distances between images I_0 ... I_n in the order of their strengths.

    metric_name: for reports. adjacent: the n distances d(I_k, I_k+1). skip_one: the n - 1 distances d(I_k, I_k+2).
    from_source: d(source, I_k), one per image; 0 for the source itself.
    squared: True if the distance of similar images grows with the square of their difference, as 1 - cosine does.
    """

    metric_name: str
    adjacent: tuple[float, ...]
    skip_one: tuple[float, ...]
    from_source: tuple[float, ...]
    squared: bool = False

    def path_lengths(self) -> tuple[float, ...]:
        """The adjacent distances as lengths that add up along the sweep, see to_lengths."""
        return self.to_lengths(self.adjacent)

    def to_lengths(self, distances: tuple[float, ...]) -> tuple[float, ...]:
        """Additive lengths: sqrt(2 d) for squared distances d, which for d = 1 - cosine is the chord; else d."""
        return tuple(math.sqrt(2 * distance) for distance in distances) if self.squared else distances


def pixel_distances(images: torch.Tensor, source_index: int = 0) -> ImageDistances:
    """Root mean square differences, 0 to 1, between the pixels of images (n, height, width, channels), 0 to 1.

    source_index: the image that from_source refers to. Raises SliderError for fewer than two images and for values that
    are not finite.
    """
    check_images(images)
    return _rms_distances(images, source_index, "pixels, root mean square")


def latent_distances(latents: torch.Tensor, source_index: int = 0) -> ImageDistances:
    """Root mean square differences between latents (n, channels, height, width), whose values are of the order of 1.

    source_index and errors: as in pixel_distances.
    """
    check_images(latents)
    return _rms_distances(latents, source_index, "latents, root mean square")


def feature_distances(images: torch.Tensor, vision: ClipVisionModel, source_index: int = 0) -> ImageDistances:
    """1 - cosine of a vision model's features (CLIP, SigLIP, DINOv2, DINOv3) of images (n, height, width, channels).

    source_index and errors: as in pixel_distances.
    """
    check_images(images)
    return cosine_distances(vision_features(images, vision), vision.model_type, source_index)


def cosine_distances(features: torch.Tensor, feature_name: str, source_index: int = 0) -> ImageDistances:
    """1 - cosine of features (n, width), computed so that equal features have a distance of exactly 0."""
    directions = normalize(features.double(), dim=-1)

    def distance(index: int, other: int) -> float:
        return float((directions[index] - directions[other]).square().sum()) / 2

    return pairwise_distances(len(features), distance, source_index, f"{feature_name}, 1 - cosine", squared=True)


def rms_difference(values: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square difference of two tensors of one shape, computed in float64."""
    return float((values.double() - other.double()).square().mean().sqrt())


def _rms_distances(values: torch.Tensor, source_index: int, metric_name: str) -> ImageDistances:
    def distance(index: int, other: int) -> float:
        return rms_difference(values[index], values[other])

    return pairwise_distances(len(values), distance, source_index, metric_name)


def fraction_outside_mask(images: torch.Tensor, mask: torch.Tensor, source_index: int = 0) -> tuple[float | None, ...]:
    """For each image, the fraction (0 to 1) of its absolute pixel change from the source that lies outside the mask.

    images: (n, height, width, channels). mask: a MASK (h, w) or (1, h, w), 1 inside, resized to the images.
    None for images that equal the source. Raises SliderError for several masks, and for a mask that is 0, or 1,
    everywhere.
    """
    check_images(images)
    masks = mask.reshape(-1, *mask.shape[-2:])
    if len(masks) != 1:
        raise SliderError(f"There are {len(masks)} masks; expected one for all images of the sweep.")
    inside = interpolate(masks[None].float(), images.shape[1:3], mode="bilinear")[0, 0].clamp(0, 1)
    if not 0 < float(inside.mean()) < 1:
        extent = "empty" if not inside.any() else "the entire image"
        raise SliderError(f"The mask is {extent}; expected a mask of the area that the edit may change.")
    fractions = []
    for image in images:
        change = (image.double() - images[source_index].double()).abs().mean(-1)
        total = float(change.sum())
        fractions.append(float((change * (1 - inside)).sum()) / total if total else None)
    return tuple(fractions)


def check_images(images: torch.Tensor) -> None:
    """Raise SliderError unless there are at least two images and all values are finite."""
    if len(images) < 2:
        raise SliderError(
            f"The sweep has {len(images)} image; expected at least two, one per strength. Link "
            f"'{names.STRENGTH_RANGE}' to the slider and to '{names.REPEAT_LATENT_FOR_SWEEP}'."
        )
    if not torch.isfinite(images).all():
        raise SliderError("The images contain values that are not finite (black images?). Render them again.")


def pairwise_distances(
    count: int, distance: Callable[[int, int], float], source_index: int, metric_name: str, squared: bool = False
) -> ImageDistances:
    """ImageDistances of `count` images from a function of two indices. Raises SliderError if one is not finite."""
    distances = ImageDistances(
        metric_name,
        tuple(distance(k, k + 1) for k in range(count - 1)),
        tuple(distance(k, k + 2) for k in range(count - 2)),
        tuple(distance(source_index, k) for k in range(count)),
        squared,
    )
    if not all(map(math.isfinite, distances.adjacent)):
        raise SliderError(f"{metric_name}: the distances are not finite. Choose another distance or vision model.")
    return distances
