"""Trajectories: the latents of an inverted image at every noise level, in memory and as safetensors files.

Latent caching of Stable Flow (arXiv 2411.14430, section 3.3). Noise level sigma_k, with sigma_0 the highest and sigma_n
= 0, belongs to latent z_k; z_n is the image latent times the nudging factor. See inversion.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save

from .. import node_names as names
from ..atomic_write import atomic_write
from ..errors import SliderError
from ..patching.model_fingerprint import ModelFingerprint
from ..sampling.flow_matching import check_sigmas
from ..tensor_file import read_tensors
from ..types import Conditioning

FORMAT = "edit-sliders trajectory 1"
_DIMENSIONS = {"latents": 4, "sigmas": 1, "text": 3, "pooled": 2, "model": 1}
"""Tensor in the file -> number of dimensions."""
_EXPECTED = f"a trajectory saved by '{names.SAVE_TRAJECTORY}'"


@dataclass(frozen=True)
class Trajectory:
    """An inverted image.

    latents: (steps + 1, channels, height, width), float32, in the model's latent scale, from noise to the nudged image.
    sigmas: (steps + 1,), the noise level of each latent, falling to 0.
    text, pooled: (1, tokens, width) and (1, width), the encoded source prompt; prompt: its text.
    nudging, refinements: arguments of the inversion. model: fingerprint of the model it was inverted with.
    """

    latents: torch.Tensor
    sigmas: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor
    prompt: str
    nudging: float
    refinements: int
    model: ModelFingerprint

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def conditioning(self) -> Conditioning:
        """The source prompt as used in the inversion, at guidance 1."""
        return [[self.text, {"pooled_output": self.pooled, "guidance": 1.0}]]

    def check_model(self, model: ModelPatcher) -> None:
        """Raise SliderError unless the image was inverted with `model`."""
        self.model.check(model, "The trajectory")

    def check_source(self, conditioning: Conditioning) -> None:
        """Raise SliderError unless the first prompt of a batch is the source prompt of the inversion."""
        text = conditioning[0][0][:1]
        if text.shape != self.text.shape:
            raise SliderError(
                f"The source prompt is {tuple(text.shape[1:])} here, but was {tuple(self.text.shape[1:])} (tokens, "
                "width) when the image was inverted: an edit prompt is longer than 512 tokens, or the text encoders "
                "are different. Shorten the edit prompt, or invert the image with these text encoders."
            )
        if (text.cpu().float() - self.text.float()).norm() > 0.05 * self.text.float().norm():
            raise SliderError(
                f"The source prompt differs from the prompt of the inversion ({self.prompt!r}), or the text encoders "
                "are different. Use the same prompt and text encoders, or invert the image again."
            )

    def describe(self) -> str:
        """Steps, size, inversion arguments and prompt, as a few lines of text."""
        height, width = self.latents.shape[-2:]
        lines = (
            f"{self.steps} steps, {width * 8} x {height * 8} pixels, {self.latents.nbytes / 2**20:.1f} MB",
            f"nudging {self.nudging:g}, refinements {self.refinements}",
            f"source: {self.prompt}",
        )
        return "\n".join(lines)


def save_trajectory(trajectory: Trajectory, path: str | Path) -> None:
    """Write a safetensors file atomically. Raises SliderError when it cannot be written."""
    path = Path(path)
    tensors = {
        "latents": trajectory.latents,
        "sigmas": trajectory.sigmas,
        "text": trajectory.text,
        "pooled": trajectory.pooled,
        "model": trajectory.model.values,
    }
    header = {
        "format": FORMAT,
        "family": trajectory.model.family,
        "prompt": trajectory.prompt,
        "nudging": repr(trajectory.nudging),
        "refinements": str(trajectory.refinements),
    }
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, header)
    try:
        atomic_write(path, content)
    except OSError as error:
        raise SliderError(
            f"{path.name} ({len(content) / 2**20:.1f} MB) cannot be written to {path.parent}: {error}. Free some disk "
            "space, or choose another name."
        ) from error


def load_trajectory(path: str | Path) -> Trajectory:
    """Read a file written by save_trajectory. Raises SliderError for other, damaged or inconsistent files."""
    tensors, header = read_tensors(path, _EXPECTED)
    name = Path(path).name
    if header.get("format") != FORMAT:
        raise SliderError(
            f"{name} is not {_EXPECTED}; the format in its header is {header.get('format', 'missing')!r}."
        )
    for key, dimensions in _DIMENSIONS.items():
        if key not in tensors or tensors[key].ndim != dimensions or not _is_finite_float(tensors[key]):
            raise SliderError(
                f"{name} has no valid {key!r}; expected a tensor of {dimensions} dimensions with finite values. Invert "
                "the image again."
            )
    latents, sigmas, text, pooled = (tensors[key] for key in ("latents", "sigmas", "text", "pooled"))
    if len(latents) != len(sigmas) or len(text) != 1 or len(pooled) != 1:
        raise SliderError(
            f"{name} has {len(latents)} latents, {len(sigmas)} sigmas and {len(text)} prompts; expected as many "
            "latents as sigmas, and one prompt. Invert the image again."
        )
    check_sigmas(sigmas)
    try:
        nudging, refinements = float(header["nudging"]), int(header["refinements"])
        prompt, family = header["prompt"], header["family"]
    except (KeyError, ValueError) as error:
        raise SliderError(
            f"The header of {name} is incomplete or invalid ({error}). Invert the image again."
        ) from error
    fingerprint = ModelFingerprint(family, tensors["model"])
    return Trajectory(latents, sigmas, text, pooled, prompt, nudging, refinements, fingerprint)


def _is_finite_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())
