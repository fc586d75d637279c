"""The parts of the miniature model: training in order, export as files for ComfyUI, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from slider_core.atomic_write import atomic_write

from ..checkpoints import Checkpoints
from ..errors import TrainingError
from ..frozen_model import FrozenModel
from . import autoencoder, text_encoders, transformer
from .autoencoder import Autoencoder
from .evaluate import Evaluation, evaluate_images, render_tasks, validation_tasks
from .latent_bank import load_training_samples
from .text_encoders import T5TokenClassifier, TextEncoders, random_clip_l
from .transformer import TransformerTraining, random_model

TRANSFORMER = "diffusion_models/miniature-kontext.safetensors"
T5 = "text_encoders/miniature-t5.safetensors"
CLIP_L = "text_encoders/miniature-clip-l.safetensors"
ENCODER = "vae_approx/taef1_encoder.safetensors"
DECODER = "vae_approx/taef1_decoder.safetensors"
NUM_SAMPLE_FILES = 60
"""Files of 1000 training samples each for the transformer."""


def train(part: str, folder: Path, steps: int | None) -> None:
    """Train 'text', 'decoder' or 'transformer' in folder/<part>.

    steps: None = as many as for the shipped weights. Raises TrainingError when a required part is not trained yet.
    """
    if part == "text":
        T5TokenClassifier().fit(folder / part, steps or text_encoders.STEPS)
    elif part == "decoder":
        Autoencoder().fit(folder / part, steps or autoencoder.STEPS)
    else:
        encoders = TextEncoders(_trained_t5(folder), random_clip_l())
        samples = load_training_samples(folder / "samples", Autoencoder(), NUM_SAMPLE_FILES)
        TransformerTraining(random_model(), encoders, samples).fit(folder / part, steps or transformer.STEPS)


def write(folder: Path, models: Path) -> list[Path]:
    """Write the trained parts in float16 into a ComfyUI models folder. Raises TrainingError when a part is missing."""
    decoder = _newest_weights(folder, "decoder")
    tensors: Mapping[str, Callable[[], Mapping[str, Tensor]]] = {
        T5: lambda: _trained_t5(folder),
        CLIP_L: random_clip_l,
        ENCODER: lambda: Autoencoder().encoder.state_dict(),
        DECODER: lambda: decoder,
        TRANSFORMER: lambda: _newest_weights(folder, "transformer"),
    }
    for name, weights in tensors.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(models / name, save({key: value.half().contiguous() for key, value in weights().items()}))
    return [models / name for name in tensors]


def evaluate(models: Path, num_scenes: int, num_edits: int) -> Evaluation:
    """Evaluate the model in a models folder on validation scenes with `num_edits` edits each."""
    model = FrozenModel.load(models / TRANSFORMER, "float32", gradient_checkpointing=False)
    encoders = TextEncoders(load_file(models / T5), load_file(models / CLIP_L))
    vae = Autoencoder()
    vae.decoder.load_state_dict(load_file(models / DECODER))
    tasks = validation_tasks(num_scenes, num_edits)
    return evaluate_images(render_tasks(model, encoders, vae, tasks), tasks)


def _trained_t5(folder: Path) -> dict[str, Tensor]:
    classifier = T5TokenClassifier()
    classifier.load_state_dict(_newest_weights(folder, "text"))
    return classifier.weights()


def _newest_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """The weights in the last checkpoint of a part."""
    checkpoint = Checkpoints(folder / part, keep_last=2).newest()
    if checkpoint is None:
        raise TrainingError(
            f"{folder} contains no trained {part}; run 'python -m training.miniature {part} {folder}' first."
        )
    return checkpoint[1]["module"]
