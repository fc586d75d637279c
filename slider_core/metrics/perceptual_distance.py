"""Perceptual distances between images: LPIPS and DreamSim.

LPIPS (Zhang et al. 2018, arXiv 1801.03924, section 3): with f_l the features of AlexNet's layer l, normalized over the
channels, and learned weights w_l,

    d(x, y) = sum over l of the mean over positions of || w_l * (f_l(x) - f_l(y)) ||^2

DreamSim (Fu et al. 2023, arXiv 2306.09344, section 4), with f(x) the image embedding of a fine-tuned OpenCLIP ViT-B/32:

    d(x, y) = 1 - cosine(f(x), f(y))

The packages lpips and dreamsim download missing weights, and can run code stored in them. Here the weights are read as
tensors only, and never downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.model_management import free_memory, get_torch_device, throw_exception_if_processing_interrupted
from PIL import Image

from ..errors import SliderError
from ..tensor_file import read_tensors
from .image_distance import ImageDistances, check_images, cosine_distances, pairwise_distances

_DREAMSIM = "open_clip_vitb32"
"""One of the authors' networks. Their default, an ensemble of three, runs code from a repository that it downloads."""
_DREAMSIM_URL = "https://github.com/ssundaram21/dreamsim"
_MIN_SIDE = 31
_BYTES_PER_PIXEL = 512
"""Upper bound for a pair of images: 80 float32 values of each, their features and differences, and a margin."""


class LpipsDistance:
    """LPIPS 0.1 with AlexNet, the distance by which Kontinuous Kontext filtered its training images.

    Raises SliderError when the package lpips is not installed, or AlexNet's weights are missing from torchvision's
    cache folder.
    """

    def __init__(self) -> None:
        self._device = get_torch_device()
        self._network = _lpips_network().to(self._device)

    @torch.inference_mode()
    def __call__(self, image: torch.Tensor | Image.Image, other: torch.Tensor | Image.Image) -> float:
        """Distance of two images of one size: PIL images, or (height, width, channels >= 3), float 0 to 1 or uint8.

        Raises SliderError for images with a side below 31 pixels.
        """
        pair = [_as_float(one) for one in (image, other)]
        height, width, _ = pair[0].shape
        if min(height, width) < _MIN_SIDE:
            raise SliderError(
                f"The images are {width} x {height} pixels; LPIPS needs at least {_MIN_SIDE} on each side. Render "
                "larger images, or choose another distance."
            )
        inputs = (one.movedim(-1, 0)[None].to(self._device, torch.float32) for one in pair)
        return self._network(*inputs, normalize=True).item()


def lpips_distances(images: torch.Tensor, source_index: int = 0) -> ImageDistances:
    """LPIPS distances of images (n, height, width, channels >= 3), 0 to 1.

    LPIPS is quadratic in the features' difference, so the distances are `squared`. source_index and errors: as in
    pixel_distances, and those of LpipsDistance.
    """
    check_images(images)
    lpips = LpipsDistance()
    free_memory(_BYTES_PER_PIXEL * images[0, ..., 0].numel(), get_torch_device())

    def distance(index: int, other: int) -> float:
        throw_exception_if_processing_interrupted()
        return lpips(images[index], images[other])

    return pairwise_distances(len(images), distance, source_index, "LPIPS (AlexNet)", squared=True)


def _as_float(image: torch.Tensor | Image.Image) -> torch.Tensor:
    """(height, width, 3), 0 to 1."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))) if isinstance(image, Image.Image) else image[..., :3]
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def _lpips_network() -> Any:
    try:
        import lpips
        from torchvision.models import AlexNet_Weights
    except ImportError as error:
        raise _missing_package("LPIPS", "lpips", error) from error
    url = AlexNet_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        raise SliderError(
            f"LPIPS needs AlexNet's weights; expected them in {file}. Nothing is downloaded automatically: download "
            f"{url} to that path, or choose another distance."
        )
    weights = read_tensors(file, "torchvision's AlexNet").tensors
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    keys = {name: "features." + name.partition(".")[2] for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({name: weights[key] for name, key in keys.items()})
    except (KeyError, RuntimeError) as error:
        raise SliderError(f"{file} is not torchvision's AlexNet: {error}. Replace it with {url}.") from error
    return network


@torch.inference_mode()
def dreamsim_distances(images: torch.Tensor, folder: Path, source_index: int = 0) -> ImageDistances:
    """DreamSim distances (OpenCLIP ViT-B/32) of images (n, height, width, channels >= 3), 0 to 1, resized to 224 x 224.

    folder: the authors' unpacked checkpoint. source_index and errors: as in pixel_distances; also SliderError when the
    package dreamsim or the checkpoint is missing or invalid.
    """
    check_images(images)
    network, preprocess = _dreamsim_network(folder)
    embeddings = []
    for image in images[..., :3]:
        throw_exception_if_processing_interrupted()
        pixels = (image.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
        embeddings.append(network.embed(preprocess(Image.fromarray(pixels))))
    return cosine_distances(torch.cat(embeddings), "DreamSim (OpenCLIP ViT-B/32)", source_index)


def _dreamsim_network(folder: Path) -> tuple[Any, Callable[[Image.Image], torch.Tensor]]:
    """The network, small enough for the CPU, and its image preprocessing."""
    try:
        from dreamsim import dreamsim
        from peft import set_peft_model_state_dict
    except ImportError as error:
        raise _missing_package("DreamSim", "dreamsim", error) from error
    base, adapter = folder / f"{_DREAMSIM}_pretrain.pth.tar", folder / f"{_DREAMSIM}_single_lora"
    adapter_weights = max(adapter.glob("adapter_model.*"), default=adapter / "adapter_model.safetensors")
    for file in (base, adapter / "adapter_config.json", adapter_weights):
        if not file.is_file():
            raise SliderError(
                f"DreamSim needs its checkpoint; expected {file}. Nothing is downloaded automatically: download "
                f"dreamsim_{_DREAMSIM}_checkpoint.zip from the releases of {_DREAMSIM_URL} and unpack it into "
                f"{folder}, or choose another distance."
            )
    lora = read_tensors(adapter_weights, "DreamSim's adapter").tensors
    read_tensors(base, "DreamSim's OpenCLIP")
    try:
        network, preprocess = dreamsim(pretrained=False, device="cpu", cache_dir=str(folder), dreamsim_type=_DREAMSIM)
        result = set_peft_model_state_dict(network, lora)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SliderError(
            f"{folder} does not contain DreamSim's checkpoint: {error}. Unpack the checkpoint there again."
        ) from error
    if missing := [key for key in result.missing_keys if "lora" in key]:
        raise SliderError(
            f"{adapter_weights} lacks {missing[0]}; expected DreamSim's adapter. Unpack the checkpoint again."
        )
    return network, preprocess


def _missing_package(distance: str, package: str, error: ImportError) -> SliderError:
    return SliderError(
        f"{distance} needs the package {package}, which cannot be imported ({error}). Install it into ComfyUI's "
        f"Python (pip install {package}), or choose another distance."
    )
