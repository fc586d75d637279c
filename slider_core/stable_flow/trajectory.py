"""The latents that lead from a picture back to noise, kept to edit it (Stable Flow, section 3.3, latent caching)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file

from ..errors import SliderError
from ..patching.model_fingerprint import ModelFingerprint
from ..sampling.flow_matching import check_sigmas
from ..tensor_file import read_tensors
from ..types import Conditioning

FORMAT = "edit-sliders trajectory 1"
_TENSORS = {"latents": 4, "sigmas": 1, "text": 3, "pooled": 2, "model": 1}
_WANTED = "a trajectory saved by 'Save Trajectory'"


@dataclass(frozen=True)
class Trajectory:
    """What inverting one picture leaves behind.

    latents: (steps + 1, channels, height, width), float32, scaled as the model sees them; from noise to the picture
    times nudging. sigmas: (steps + 1,) their noise levels, falling to 0.
    text, pooled: (1, rows, width) and (1, width) of the source prompt; prompt: its words.
    nudging, refinements: as it was inverted. model: with which model.
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
        """The source prompt as it was when the picture was inverted: at guidance 1."""
        return [[self.text, {"pooled_output": self.pooled, "guidance": 1.0}]]

    def check_model(self, model: ModelPatcher) -> None:
        """Raise SliderError unless it was made with `model`."""
        self.model.check(model, "The trajectory")

    def check_source(self, conditioning: Conditioning) -> None:
        """Raise SliderError unless the first prompt of a batched conditioning is the one that was inverted."""
        text = conditioning[0][0][:1]
        if text.shape != self.text.shape:
            raise SliderError(
                f"The source prompt is {tuple(text.shape[1:])} here, but was {tuple(self.text.shape[1:])} (rows, "
                "width) when the picture was inverted: an edit is longer than 512 tokens, or the text encoders are "
                "other ones. Shorten the edit, or invert with these text encoders."
            )
        if (text.cpu().float() - self.text.float()).norm() > 0.05 * self.text.float().norm():
            raise SliderError(
                f"The source prompt is not what the picture was inverted with ({self.prompt!r}), or the text encoders "
                "are other ones. Use that prompt and those text encoders, or invert anew."
            )

    def describe(self) -> str:
        """What it is, in a few lines for the user."""
        height, width = self.latents.shape[-2:]
        lines = (
            f"{self.steps} steps, {width * 8} x {height * 8} pixels, {self.latents.nbytes / 2**20:.1f} MB",
            f"nudging {self.nudging:g}, refinements {self.refinements}",
            f"source: {self.prompt}",
        )
        return "\n".join(lines)


def save_trajectory(trajectory: Trajectory, path: str | Path) -> None:
    """Write a safetensors file, whole or not at all. Raises SliderError when the disk does not take it."""
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
    unfinished = path.with_name(f"{path.name}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, header)
        os.replace(unfinished, path)
    except Exception as error:
        unfinished.unlink(missing_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
        raise SliderError(
            f"{path.name} ({size:.1f} MB) cannot be written to {path.parent}: {error}. Make room there, or choose "
            "another name."
        ) from error


def load_trajectory(path: str | Path) -> Trajectory:
    """Read what save_trajectory wrote. Raises SliderError for any other, damaged or inconsistent file."""
    tensors, header = read_tensors(path, _WANTED)
    name = Path(path).name
    if header.get("format") != FORMAT:
        raise SliderError(f"{name} is not {_WANTED}; its header says {header.get('format', 'nothing')!r}.")
    for key, dimensions in _TENSORS.items():
        if key not in tensors or tensors[key].ndim != dimensions or not _numbers(tensors[key]):
            raise SliderError(
                f"{name} has no usable {key!r}; expected {dimensions} dimensions of finite numbers. Invert anew."
            )
    latents, sigmas, text, pooled = (tensors[key] for key in ("latents", "sigmas", "text", "pooled"))
    if len(latents) != len(sigmas) or len(text) != 1 or len(pooled) != 1:
        raise SliderError(
            f"{name} holds {len(latents)} latents for {len(sigmas)} noise levels, and {len(text)} prompts; expected a "
            "latent for each, and one prompt. Invert anew."
        )
    check_sigmas(sigmas)
    try:
        nudging, refinements = float(header["nudging"]), int(header["refinements"])
        prompt, family = header["prompt"], header["family"]
    except (KeyError, ValueError) as error:
        raise SliderError(f"{name} does not tell how it was made ({error}). Invert anew.") from error
    identity = ModelFingerprint(family, tensors["model"])
    return Trajectory(latents, sigmas, text, pooled, prompt, nudging, refinements, identity)


def _numbers(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())
