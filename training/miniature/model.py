"""The parts of the miniature model together: trained one after the other, as files for ComfyUI, and examined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from slider_core.atomic_write import atomic_write

from ..checkpoints import Checkpoints
from ..errors import TrainingError
from ..frozen_model import BaseModel
from . import autoencoder, text_encoders, transformer
from .autoencoder import Autoencoder
from .evaluate import Examined, examined, held_out_tasks, rendered
from .latent_bank import training_samples
from .text_encoders import T5Reader, TextEncoders, random_clip_l
from .transformer import Lessons, untrained

TRANSFORMER = "diffusion_models/miniature-kontext.safetensors"
T5 = "text_encoders/miniature-t5.safetensors"
CLIP_L = "text_encoders/miniature-clip-l.safetensors"
ENCODER = "vae_approx/taef1_encoder.safetensors"
DECODER = "vae_approx/taef1_decoder.safetensors"
THOUSANDS = 60
"""Of the samples that the transformer learns from."""


def train(part: str, work: Path, steps: int | None) -> None:
    """Train 'text', 'decoder' or 'transformer' in work/<part>. Raises TrainingError when what it needs is missing."""
    if part == "text":
        T5Reader().learn(work / part, steps or text_encoders.STEPS)
    elif part == "decoder":
        Autoencoder().learn(work / part, steps or autoencoder.STEPS)
    else:
        encoders = TextEncoders(_trained_t5(work), random_clip_l())
        samples = training_samples(work / "samples", Autoencoder(), THOUSANDS)
        Lessons(untrained(), encoders, samples).learn(work / part, steps or transformer.STEPS)


def write(work: Path, models: Path) -> list[Path]:
    """Write what was trained, in half precision. Raises TrainingError when a part is missing."""
    decoder = _newest(work, "decoder")
    tensors: Mapping[str, Callable[[], Mapping[str, Tensor]]] = {
        T5: lambda: _trained_t5(work),
        CLIP_L: random_clip_l,
        ENCODER: lambda: Autoencoder().encoder.state_dict(),
        DECODER: lambda: decoder,
        TRANSFORMER: lambda: _newest(work, "transformer"),
    }
    for name, made in tensors.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(models / name, save({key: value.half().contiguous() for key, value in made().items()}))
    return [models / name for name in tensors]


def examine(models: Path, scenes: int, edits_each: int) -> Examined:
    """How well the files in a models folder do what they are told."""
    base = BaseModel.load(models / TRANSFORMER, "float32", checkpointing=False)
    encoders = TextEncoders(load_file(models / T5), load_file(models / CLIP_L))
    made = Autoencoder()
    made.decoder.load_state_dict(load_file(models / DECODER))
    tasks = held_out_tasks(scenes, edits_each)
    return examined(rendered(base, encoders, made, tasks), tasks)


def _trained_t5(work: Path) -> dict[str, Tensor]:
    reader = T5Reader()
    reader.load_state_dict(_newest(work, "text"))
    return reader.weights()


def _newest(work: Path, part: str) -> dict[str, Tensor]:
    """The weights of a part as trained so far."""
    found = Checkpoints(work / part, keep=2).newest()
    if found is None:
        raise TrainingError(f"{work} has no trained {part}; run 'python -m training.miniature {part} {work}' first.")
    return found[1]["module"]
