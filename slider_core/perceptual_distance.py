"""How different people find pictures, as far as LPIPS knows (Zhang et al. 2018, arXiv:1801.03924, section 3).

The package lpips calls torchvision for AlexNet, which downloads weights that are missing and unpickles whatever is in
them. Here they are read from where torchvision keeps them, as tensors only, and never downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy.model_management import free_memory, get_torch_device, throw_exception_if_processing_interrupted

from .errors import SliderError
from .picture_distance import PictureDistances, check_pictures, pair_distances
from .tensor_file import read_tensors

_LEAST_SIDE = 31
_BYTES_PER_PIXEL = 512
"""At most, of a pair: 80 float32 of both pictures, their features and the differences, and some room."""


@torch.inference_mode()
def lpips_distances(images: torch.Tensor, source: int = 0) -> PictureDistances:
    """LPIPS 0.1 with AlexNet, by which Kontinuous Kontext chose its training pictures, of images (n, h, w, 3), 0 to 1.

    It is a weighted mean square of the difference of features, so small steps' distances grow with their square.
    source and errors: as pixel_distances; also SliderError where the package lpips or AlexNet's weights are not on this
    computer, and for pictures with a side below 31 pixels.
    """
    check_pictures(images)
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
        raise SliderError(
            f"LPIPS needs the package lpips, which cannot be imported ({error}). Install it into ComfyUI's Python: "
            "pip install lpips. Or compare by something else."
        ) from error
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
