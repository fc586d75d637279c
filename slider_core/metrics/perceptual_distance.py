"""How different people find pictures, as far as LPIPS and DreamSim know.

LPIPS: Zhang et al. 2018, arXiv:1801.03924, section 3. DreamSim: Fu et al. 2023, arXiv:2306.09344, section 4.

The packages lpips and dreamsim download weights that are missing, and one of their ways of reading them runs what is in
them. Here they are read as tensors only, and never downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy.model_management import free_memory, get_torch_device, throw_exception_if_processing_interrupted
from PIL import Image

from ..errors import SliderError
from ..tensor_file import read_tensors
from .image_distance import ImageDistances, check_images, distances_of_features, pair_distances

_DREAMSIM = "open_clip_vitb32"
"""Of the authors' networks. Their default, three together, runs code from a repository that it downloads."""
_DREAMSIM_URL = "https://github.com/ssundaram21/dreamsim"
_LEAST_SIDE = 31
_BYTES_PER_PIXEL = 512
"""At most, of a pair: 80 float32 of both pictures, their features and the differences, and some room."""


@torch.inference_mode()
def lpips_distances(images: torch.Tensor, source: int = 0) -> ImageDistances:
    """LPIPS 0.1 with AlexNet, by which Kontinuous Kontext chose its training pictures, of images (n, h, w, 3), 0 to 1.

    It is a weighted mean square of the difference of features, so small steps' distances grow with their square.
    source and errors: as pixel_distances; also SliderError where the package lpips or AlexNet's weights are not on this
    computer, and for pictures with a side below 31 pixels.
    """
    check_images(images)
    _, height, width, _ = images.shape
    if min(height, width) < _LEAST_SIDE:
        raise SliderError(
            f"The pictures are {width} x {height}; LPIPS needs {_LEAST_SIDE} pixels or more on each side. Render "
            "larger ones, or compare by something else."
        )
    network, device = _network(), get_torch_device()
    free_memory(_BYTES_PER_PIXEL * height * width, device)
    network.to(device)

    def apart(one: int, other: int) -> float:
        throw_exception_if_processing_interrupted()
        pair = (images[k : k + 1, ..., :3].movedim(-1, 1).to(device, torch.float32) for k in (one, other))
        return network(*pair, normalize=True).item()

    return pair_distances(len(images), source, "LPIPS (AlexNet)", apart, squared=True)


def _network() -> Any:
    try:
        import lpips
        from torchvision.models import AlexNet_Weights
    except ImportError as error:
        raise _not_installed("LPIPS", "lpips", error) from error
    url = AlexNet_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        raise SliderError(
            f"LPIPS needs AlexNet's weights; expected them in {file}. Nothing is downloaded for you: get {url} and put "
            "it there, or compare by something else."
        )
    weights = read_tensors(file, "torchvision's AlexNet").tensors
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    wanted = {name: "features." + name.partition(".")[2] for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({name: weights[key] for name, key in wanted.items()})
    except (KeyError, RuntimeError) as error:
        raise SliderError(f"{file} is not torchvision's AlexNet: {error}. Put {url} there.") from error
    return network


@torch.inference_mode()
def dreamsim_distances(images: torch.Tensor, folder: Path, source: int = 0) -> ImageDistances:
    """DreamSim with OpenCLIP ViT-B/32, 1 - cosine of what it says of images (n, h, w, 3), 0 to 1, made 224 x 224.

    folder: where the authors' checkpoint lies, unpacked. source and errors: as pixel_distances; also SliderError where
    the package dreamsim or the checkpoint is not on this computer, or is something else.
    """
    check_images(images)
    network, prepare = _dreamsim(folder)
    features = []
    for picture in images[..., :3]:
        throw_exception_if_processing_interrupted()
        pixels = (picture.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
        features.append(network.embed(prepare(Image.fromarray(pixels))))
    return distances_of_features(torch.cat(features), "DreamSim (OpenCLIP ViT-B/32)", source)


def _dreamsim(folder: Path) -> tuple[Any, Callable[[Image.Image], torch.Tensor]]:
    """The network, which is small enough for the CPU, and what makes its inputs of pictures."""
    try:
        from dreamsim import dreamsim
        from peft import set_peft_model_state_dict
    except ImportError as error:
        raise _not_installed("DreamSim", "dreamsim", error) from error
    base, adapter = folder / f"{_DREAMSIM}_pretrain.pth.tar", folder / f"{_DREAMSIM}_single_lora"
    tensors = max(adapter.glob("adapter_model.*"), default=adapter / "adapter_model.safetensors")
    for file in (base, adapter / "adapter_config.json", tensors):
        if not file.is_file():
            raise SliderError(
                f"DreamSim needs its checkpoint; expected {file}. Nothing is downloaded for you: get "
                f"dreamsim_{_DREAMSIM}_checkpoint.zip from the releases of {_DREAMSIM_URL} and unpack it into "
                f"{folder}, or compare by something else."
            )
    learned = read_tensors(tensors, "DreamSim's adapter").tensors
    read_tensors(base, "DreamSim's OpenCLIP")
    try:
        network, prepare = dreamsim(pretrained=False, device="cpu", cache_dir=str(folder), dreamsim_type=_DREAMSIM)
        found = set_peft_model_state_dict(network, learned)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise SliderError(f"{folder} has not DreamSim's checkpoint: {error}. Unpack it there once more.") from error
    if missing := [key for key in found.missing_keys if "lora" in key]:
        raise SliderError(
            f"{tensors} lacks {missing[0]}; expected DreamSim's adapter. Unpack the checkpoint once more."
        )
    return network, prepare


def _not_installed(distance: str, package: str, error: ImportError) -> SliderError:
    return SliderError(
        f"{distance} needs the package {package}, which cannot be imported ({error}). Install it into ComfyUI's "
        f"Python: pip install {package}. Or compare by something else."
    )
