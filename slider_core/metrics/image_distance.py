"""How far the pictures of a sweep are from each other: by their pixels, or by what a vision model sees in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.clip_vision import ClipVisionModel
from torch.nn.functional import interpolate, normalize

from ..errors import SliderError

_AT_ONCE = 8


@dataclass(frozen=True)
class ImageDistances:
    """Distances between pictures I_0 ... I_n in the order of their strength.

    compared_by: in words. adjacent: d(I_k, I_k+1), n of them. skipping: d(I_k, I_k+2), one less.
    from_source: d(source, I_k), one per picture; 0 at the source itself.
    squared: whether small steps' distances grow with their square, as those of 1 - cosine do.
    """

    compared_by: str
    adjacent: tuple[float, ...]
    skipping: tuple[float, ...]
    from_source: tuple[float, ...]
    squared: bool = False

    def lengths(self) -> tuple[float, ...]:
        """The adjacent ones so that they add up along a path: sqrt(2 d) of squared ones, of 1 - cosine the chord."""
        return self.as_lengths(self.adjacent)

    def as_lengths(self, distances: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(math.sqrt(2 * distance) for distance in distances) if self.squared else distances


def pixel_distances(images: torch.Tensor, source: int = 0) -> ImageDistances:
    """Root mean squares, 0 to 1, of the differences between the pixels of images (n, h, w, 3).

    source: the picture that from_source starts at. Raises SliderError for fewer than two pictures, or none finite.
    """
    check_images(images)
    return _root_mean_squares(images, source, "pixels, root mean square")


def latent_distances(latents: torch.Tensor, source: int = 0) -> ImageDistances:
    """Root mean squares of the differences between latents (n, channels, height, width), which spread by about 1.

    source and errors: as pixel_distances.
    """
    check_images(latents)
    return _root_mean_squares(latents, source, "latents, root mean square")


def feature_distances(images: torch.Tensor, vision: ClipVisionModel, source: int = 0) -> ImageDistances:
    """1 - cosine of what a vision model (CLIP, SigLIP, DINOv2, DINOv3) says of images (n, h, w, 3).

    source and errors: as pixel_distances.
    """
    check_images(images)
    return distances_of_features(vision_features(images, vision), vision.model_type, source)


def distances_of_features(features: torch.Tensor, name: str, source: int = 0) -> ImageDistances:
    """1 - cosine of features (n, width); equal features have distance 0 to the last bit."""
    directions = normalize(features.double(), dim=-1)

    def apart(one: int, other: int) -> float:
        return float((directions[one] - directions[other]).square().sum()) / 2

    return pair_distances(len(features), source, f"{name}, 1 - cosine", apart, squared=True)


@torch.inference_mode()
def vision_features(
    images: torch.Tensor, vision: ClipVisionModel, crop: bool = False, average_tokens: bool = True
) -> torch.Tensor:
    """(n, width), float32: the embeddings of pictures; of models that give one vector per part of them, the mean.

    crop: see only the square in the middle of the pictures, as CLIP was trained to.
    """
    found = []
    for pictures in images.split(_AT_ONCE):
        output = vision.encode_image(pictures[..., :3], crop=crop)
        embedding = output["image_embeds"]
        if embedding is None:
            embedding = output["last_hidden_state"].mean(1)
        elif embedding.ndim == 3:
            embedding = embedding.mean(1) if average_tokens else embedding.flatten(1)
        found.append(embedding.float())
    return torch.cat(found)


def _root_mean_squares(values: torch.Tensor, source: int, compared_by: str) -> ImageDistances:
    def apart(one: int, other: int) -> float:
        return float((values[one].double() - values[other].double()).square().mean().sqrt())

    return pair_distances(len(values), source, compared_by, apart)


def share_outside(images: torch.Tensor, region: torch.Tensor, source: int = 0) -> tuple[float | None, ...]:
    """Of each picture's change from the source, in absolute values of pixels, the share that lies outside a region.

    images: (n, h, w, 3). region: a MASK (h', w') or (1, h', w'), 1 inside, brought to the pictures' size.
    None where nothing changes. Raises SliderError when the region is several masks, empty or the whole picture.
    """
    check_images(images)
    masks = region.reshape(-1, *region.shape[-2:])
    if len(masks) != 1:
        raise SliderError(f"The region is {len(masks)} masks; expected one for all pictures of the sweep.")
    inside = interpolate(masks[None].float(), images.shape[1:3], mode="bilinear")[0, 0].clamp(0, 1)
    if not 0 < float(inside.mean()) < 1:
        what = "empty" if not inside.any() else "the whole picture"
        raise SliderError(f"The region is {what}; expected a mask of the part that the edit is about.")
    shares = []
    for picture in images:
        change = (picture.double() - images[source].double()).abs().mean(-1)
        total = float(change.sum())
        shares.append(float((change * (1 - inside)).sum()) / total if total else None)
    return tuple(shares)


def check_images(images: torch.Tensor) -> None:
    """Raise SliderError unless these are two pictures or more, of finite numbers."""
    if len(images) < 2:
        raise SliderError(
            f"There is {len(images)} picture; expected two or more, one per strength. Link Strength Range to the "
            "slider and to Latent for Sweep."
        )
    if not torch.isfinite(images).all():
        raise SliderError("The pictures have numbers that are not finite (black pictures?); render them again.")


def pair_distances(
    count: int, source: int, compared_by: str, apart: Callable[[int, int], float], squared: bool = False
) -> ImageDistances:
    """Those of `count` pictures, two at a time. Raises SliderError where they are not finite."""
    found = ImageDistances(
        compared_by,
        tuple(apart(k, k + 1) for k in range(count - 1)),
        tuple(apart(k, k + 2) for k in range(count - 2)),
        tuple(apart(source, k) for k in range(count)),
        squared,
    )
    if not all(map(math.isfinite, found.adjacent)):
        raise SliderError(f"{compared_by}: the distances are not finite; compare by another model.")
    return found
