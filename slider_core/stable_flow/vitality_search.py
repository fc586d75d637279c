"""Vitality: how much the images change without a transformer block (Stable Flow, arXiv 2411.14430, section 3.1).

For prompts p and seeds s, with M the full model, M_l the model without block l, and d the similarity of images:

    vitality(l) = 1 - mean over (s, p) of d(M(s, p), M_l(s, p))        (equation 1)
    vital layers = all l with vitality(l) >= tau                       (equation 2)

d is the cosine similarity of features: DINOv2 in the paper; here any vision model, or the latent itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sample
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ..atomic_write import atomic_write
from ..errors import SliderError
from ..patching.model_fingerprint import fingerprint_of
from ..sampling.sampling_settings import SamplingSettings
from ..text.batched_prompts import batch_prompts, split_prompts
from ..types import Conditioning
from ..vision_features import vision_features
from .vital_layers import block_count, bypass_blocks

FORMAT = "edit-sliders layer scores 1"

_NUM_REFERENCE_VALUES = 32
_TOLERANCE = 0.02

OnImage = Callable[[int, int, torch.Tensor], None]
"""(images rendered so far, images in total, latent), called after each image."""


class ImageFeatures(NamedTuple):
    """name: for reports. of_latent: latent (1, channels, height, width) -> features (width,), float32."""

    name: str
    of_latent: Callable[[torch.Tensor], torch.Tensor]


class RenderPlan(NamedTuple):
    """The images to compare: one per prompt and seed.

    prompts: text -> conditioning. latent: (1, channels, height, width), empty. Sampled with euler, simple, cfg 1.
    """

    prompts: Mapping[str, Conditioning]
    seeds: Sequence[int]
    latent: torch.Tensor
    steps: int


@dataclass
class VitalityScores:
    """Similarities of images rendered with and without a block.

    settings: what the scores depend on. similarities: block index -> image -> cosine similarity, 1 = no change.
    samples: image -> a few feature values of the full model's image. They differ after a change that is not among the
    settings, such as other LoRAs, text encoders or vision models.
    """

    settings: Mapping[str, Any]
    similarities: dict[int, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def similarity(self, block_index: int) -> float:
        """Mean over the images rendered so far."""
        values = self.similarities[block_index].values()
        return sum(values) / len(values)

    def vitality(self, block_index: int) -> float:
        """1 - mean similarity: 0 = the block has no effect."""
        return 1.0 - self.similarity(block_index)

    def most_vital(self, count: int) -> list[int]:
        """The `count` block indices of the highest vitality, ascending. Raises SliderError for an invalid count."""
        check_block_count(count, len(self.similarities))
        return sorted(sorted(self.similarities, key=self.vitality, reverse=True)[:count])

    def above(self, threshold: float) -> list[int]:
        """Block indices of a vitality of at least `threshold`, ascending. Raises SliderError when there are none."""
        indices = [index for index in sorted(self.similarities) if self.vitality(index) >= threshold]
        if not indices:
            highest = max(map(self.vitality, self.similarities))
            raise SliderError(
                f"No layer has a vitality of at least {threshold:g}; the highest is {highest:.4f}. Lower the threshold."
            )
        return indices

    def mean_similarities(self) -> dict[int, float]:
        """Block index -> mean similarity, ascending."""
        return {index: self.similarity(index) for index in sorted(self.similarities)}

    def describe(self) -> str:
        """What the similarities are, in one line."""
        num_images = max(len(values) for values in self.similarities.values())
        return f"Compared by {self.settings['compared by']}, mean of {num_images} image(s)"

    def as_json(self) -> str:
        similarities = {str(index): self.similarities[index] for index in sorted(self.similarities)}
        vitality = {index: round(self.vitality(int(index)), 6) for index in similarities}
        content = {"format": FORMAT, "settings": self.settings, "vitality": vitality, "similarities": similarities}
        return json.dumps({**content, "samples": self.samples}, indent=1, ensure_ascii=False)


def check_block_count(count: int, total: int) -> None:
    """Raise SliderError unless 1 <= count <= total, the model's number of blocks."""
    if not 1 <= count <= total:
        raise SliderError(f"top_k is {count}; expected 1 to {total}, the number of the model's layers.")


LATENT_FEATURES = ImageFeatures("the latent itself", lambda latent: latent.flatten().float())


def choose_features(vae: VAE | None, vision: ClipVisionModel | None) -> ImageFeatures:
    """Features of a vision model (DINOv2, CLIP, SigLIP) of the decoded image, or without one the latent itself.

    Raises SliderError for a vision model without a VAE.
    """
    if vision is None:
        return LATENT_FEATURES
    if vae is None:
        raise SliderError(
            "clip_vision compares decoded images, so it needs a vae. Connect a vae, or remove clip_vision."
        )

    def of_latent(latent: torch.Tensor) -> torch.Tensor:
        return vision_features(vae.decode(latent), vision, crop=True, average_tokens=False).flatten()

    return ImageFeatures(vision.model_type, of_latent)


def encode_prompts(
    clip: CLIP, text: str, guidance: float, reference_latent: torch.Tensor | None = None
) -> dict[str, Conditioning]:
    """One conditioning per line of text, with FLUX guidance and, for edit models, the latent of the image to edit."""
    conditionings = {prompt: batch_prompts(clip, [prompt], [guidance]) for prompt in split_prompts(text)}
    if reference_latent is None:
        return conditionings
    reference = {"reference_latents": [reference_latent]}
    return {
        prompt: [[cond, {**options, **reference}] for cond, options in conditioning]
        for prompt, conditioning in conditionings.items()
    }


def measure_vitality(
    model: ModelPatcher,
    plan: RenderPlan,
    features: ImageFeatures,
    file_prefix: str,
    extra_settings: Mapping[str, Any],
    on_image: OnImage | None = None,
) -> VitalityScores:
    """Bypass each block in turn and compare the images with those of the full model.

    Renders 1 + number of blocks images per prompt and seed. After each image the scores are saved to
    <file_prefix>_<hash of the settings>.json, and an interrupted run resumes from there. extra_settings: what else the
    scores depend on. Even when all scores are saved, the first image is rendered to detect other changes.
    Raises SliderError without prompts, and when the file cannot be written.
    """
    if not plan.prompts:
        raise SliderError("There are no prompts; expected at least one, one per line.")
    return _VitalitySearch(model, plan, features, file_prefix, extra_settings, on_image).run()


class _VitalitySearch:
    def __init__(
        self,
        model: ModelPatcher,
        plan: RenderPlan,
        features: ImageFeatures,
        file_prefix: str,
        extra_settings: Mapping[str, Any],
        on_image: OnImage | None,
    ):
        self.model, self.plan, self.features, self.on_image = model, plan, features, on_image
        self.block_indices = range(block_count(model))
        self.settings = {
            "model": _fingerprint_text(model),
            "prompts": list(plan.prompts),
            "seeds": list(plan.seeds),
            "size": list(plan.latent.shape[1:]),
            "steps": plan.steps,
            **extra_settings,
        }
        self.file = Path(f"{file_prefix}_{_digest(self.settings)}.json")
        self.scores = _load_scores(self.file, self.settings)
        self.num_done = 0

    def run(self) -> VitalityScores:
        for number, (prompt, seed) in enumerate(product(self.plan.prompts, self.plan.seeds)):
            image = f"{prompt} ({seed})"
            if number > 0 and len(self._scored_blocks(image)) == len(self.block_indices):
                self.num_done += 1 + len(self.block_indices)
            else:
                self._score_image(image, prompt, seed)
        return self.scores

    def _scored_blocks(self, image: str) -> list[int]:
        return [index for index in self.block_indices if image in self.scores.similarities.get(index, {})]

    def _score_image(self, image: str, prompt: str, seed: int) -> None:
        full = self._render(self.model, prompt, seed)
        if not _matches_sample(self.scores.samples.get(image), full):
            self.scores = VitalityScores(self.settings)
        self.scores.samples[image] = _sample_of(full)
        scored = self._scored_blocks(image)
        self.num_done += len(scored)
        for index in self.block_indices:
            if index not in scored:
                without = self._render(bypass_blocks(self.model, [index]), prompt, seed)
                similarity = torch.cosine_similarity(full, without, dim=0).item()
                self.scores.similarities.setdefault(index, {})[image] = similarity
                _save_scores(self.file, self.scores)

    def _render(self, model: ModelPatcher, prompt: str, seed: int) -> torch.Tensor:
        """Features of the image of a prompt and seed."""
        plan = self.plan
        noise = comfy.sample.prepare_noise(plan.latent, seed)
        samples = SamplingSettings(plan.steps, seed).sample(model, plan.prompts[prompt], plan.latent, noise)
        self.num_done += 1
        if self.on_image is not None:
            total = len(plan.prompts) * len(plan.seeds) * (1 + len(self.block_indices))
            self.on_image(self.num_done, total, samples)
        return self.features.of_latent(samples)


def _sample_of(features: torch.Tensor) -> list[float]:
    """A few evenly spaced values."""
    num_values = min(len(features), _NUM_REFERENCE_VALUES)
    return features[torch.linspace(0, len(features) - 1, num_values).long()].tolist()


def _matches_sample(saved: list[float] | None, features: torch.Tensor) -> bool:
    """Whether the saved values are those of these features, up to the rounding of a GPU; True if none are saved."""
    if saved is None:
        return True
    expected, actual = torch.tensor(saved), torch.tensor(_sample_of(features))
    return expected.shape == actual.shape and bool((expected - actual).norm() <= _TOLERANCE * actual.norm())


def _fingerprint_text(model: ModelPatcher) -> str:
    fingerprint = fingerprint_of(model)
    return f"{fingerprint.family} {_digest(fingerprint.values.float().tolist())}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def _load_scores(file: Path, settings: Mapping[str, Any]) -> VitalityScores:
    """Scores of an earlier run with the same settings; empty when there are none, or the file is invalid."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        similarities = {
            int(index): {str(image): float(value) for image, value in images.items()}
            for index, images in content["similarities"].items()
        }
        samples = {str(image): [float(value) for value in values] for image, values in content["samples"].items()}
        is_valid = content["format"] == FORMAT and content["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_valid = False
    return VitalityScores(settings, similarities, samples) if is_valid else VitalityScores(settings)


def _save_scores(file: Path, scores: VitalityScores) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, scores.as_json().encode())
    except OSError as error:
        raise SliderError(
            f"The scores cannot be written to {file}: {error}. Free some disk space, or choose another filename_prefix."
        ) from error
