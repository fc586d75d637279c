"""How vital each layer is: what the model makes without it (Stable Flow, section 3.1, equations 1 and 2)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

from ..errors import SliderError
from ..patching.model_fingerprint import fingerprint_of
from ..types import Conditioning
from .vital_layers import block_count, bypass

FORMAT = "edit-sliders layer scores 1"

_SAMPLE = 32
_ROUNDING = 0.02

Features = Callable[[torch.Tensor], torch.Tensor]
"""Latent (1, channels, height, width) -> a vector that is alike for pictures that look alike."""

OnPicture = Callable[[int, int, torch.Tensor], None]
"""(pictures rendered, pictures in all, latent), called after each picture."""


@dataclass
class LayerScores:
    """Similarities of pictures with and without a layer.

    settings: what they depend on. similarities: layer -> picture -> cosine similarity, 1 = the layer does nothing.
    samples: picture -> some numbers of what the whole model made, by which other models, LoRAs, text encoders or
    vision models are noticed.
    """

    settings: Mapping[str, Any]
    similarities: dict[int, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def similarity(self, layer: int) -> float:
        """Mean over the pictures so far."""
        values = self.similarities[layer].values()
        return sum(values) / len(values)

    def vitality(self, layer: int) -> float:
        """1 - mean similarity: 0 = the layer does nothing."""
        return 1.0 - self.similarity(layer)

    def most_vital(self, count: int) -> list[int]:
        """The `count` layers without which the pictures change most, in their order in the model."""
        check_count(count, len(self.similarities))
        return sorted(sorted(self.similarities, key=self.vitality, reverse=True)[:count])

    def above(self, threshold: float) -> list[int]:
        """The layers whose vitality is at least `threshold` (equation 2). Raises SliderError when there are none."""
        chosen = [layer for layer in sorted(self.similarities) if self.vitality(layer) >= threshold]
        if not chosen:
            most = max(map(self.vitality, self.similarities))
            raise SliderError(f"No layer has a vitality of {threshold:g}; the highest is {most:.4f}. Choose less.")
        return chosen

    def as_json(self) -> str:
        layers = {str(layer): self.similarities[layer] for layer in sorted(self.similarities)}
        vitality = {layer: round(self.vitality(int(layer)), 6) for layer in layers}
        content = {"format": FORMAT, "settings": self.settings, "vitality": vitality, "similarities": layers}
        return json.dumps({**content, "samples": self.samples}, indent=1, ensure_ascii=False)


def check_count(count: int, layers: int) -> None:
    """Raise SliderError unless so many of the model's layers can be chosen."""
    if not 1 <= count <= layers:
        raise SliderError(f"{count} layers were asked for; expected 1 to {layers}, as many as the model has.")


def latent_features(latent: torch.Tensor) -> torch.Tensor:
    """The latent itself."""
    return latent.flatten().float()


def picture_features(vae: VAE, vision: ClipVisionModel) -> Features:
    """What a vision model (DINOv2, CLIP, SigLIP) says of the decoded picture."""

    def features(latent: torch.Tensor) -> torch.Tensor:
        output = vision.encode_image(vae.decode(latent))
        embedding = output["image_embeds"]
        return (output["last_hidden_state"].mean(1) if embedding is None else embedding).flatten().float()

    return features


def scores_of(
    model: ModelPatcher,
    prompts: Mapping[str, Conditioning],
    seeds: Sequence[int],
    latent: torch.Tensor,
    steps: int,
    features: Features,
    folder: Path,
    name: str,
    more_settings: Mapping[str, Any],
    on_picture: OnPicture | None = None,
) -> LayerScores:
    """Bypass each layer in turn over prompts and seeds, and compare with the whole model's picture.

    prompts: words -> conditioning. latent: (1, channels, height, width), empty. folder, name: scores so far are
    kept there after every picture, with a suffix that tells the settings apart, so that an interrupted run goes on;
    more_settings: what else the features depend on. Renders 1 + number of layers pictures per prompt and seed, with
    ComfyUI's euler and simple. Where all is there already, the first picture is rendered still, to see that nothing
    else has changed. Raises SliderError without prompts, and when the file cannot be written.
    """
    if not prompts:
        raise SliderError("There is no prompt; expected at least one, one per line.")
    settings = {
        "model": _fingerprint(model),
        "prompts": list(prompts),
        "seeds": list(seeds),
        "size": list(latent.shape[1:]),
        "steps": steps,
        **more_settings,
    }
    file = folder / f"{name}_{_digest(settings)}.json"
    scores, layers = _resumed(file, settings), range(block_count(model))
    pictures = [(words, seed) for words in prompts for seed in seeds]
    rendered = 0

    def render(patched: ModelPatcher, words: str, seed: int) -> torch.Tensor:
        nonlocal rendered
        noise = comfy.sample.prepare_noise(latent, seed)
        inputs = (noise, steps, 1.0, "euler", "simple", prompts[words], prompts[words], latent)
        samples = comfy.sample.sample(patched, *inputs, disable_pbar=True, seed=seed)
        rendered += 1
        if on_picture is not None:
            on_picture(rendered, len(pictures) * (1 + len(layers)), samples)
        return features(samples)

    for words, seed in pictures:
        picture = f"{words} ({seed})"
        known = [layer for layer in layers if picture in scores.similarities.get(layer, {})]
        if len(known) == len(layers) and (words, seed) != pictures[0]:
            rendered += 1 + len(layers)
            continue
        whole = render(model, words, seed)
        if not _same_sample(scores.samples.get(picture), whole):
            scores, known = LayerScores(settings), []
        scores.samples[picture] = _sample(whole)
        rendered += len(known)
        for layer in layers:
            if layer not in known:
                without = render(bypass(model, [layer]), words, seed)
                similarity = torch.cosine_similarity(whole, without, dim=0).item()
                scores.similarities.setdefault(layer, {})[picture] = similarity
                _write(file, scores)
    return scores


def _sample(features: torch.Tensor) -> list[float]:
    return features[torch.linspace(0, len(features) - 1, min(len(features), _SAMPLE)).long()].tolist()


def _same_sample(known: list[float] | None, features: torch.Tensor) -> bool:
    """Whether these are the features that the numbers were taken of, up to the rounding of a GPU."""
    if known is None:
        return True
    one, two = torch.tensor(known), torch.tensor(_sample(features))
    return one.shape == two.shape and bool((one - two).norm() <= _ROUNDING * two.norm())


def _fingerprint(model: ModelPatcher) -> str:
    identity = fingerprint_of(model)
    return f"{identity.family} {_digest(identity.values.float().tolist())}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def _resumed(file: Path, settings: Mapping[str, Any]) -> LayerScores:
    """Scores of an earlier run with these settings; empty when there are none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        similarities = {
            int(layer): {str(picture): float(value) for picture, value in pictures.items()}
            for layer, pictures in content["similarities"].items()
        }
        samples = {str(picture): [float(value) for value in values] for picture, values in content["samples"].items()}
        known = content["format"] == FORMAT and content["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = False
    return LayerScores(settings, similarities, samples) if known else LayerScores(settings)


def _write(file: Path, scores: LayerScores) -> None:
    unfinished = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(scores.as_json(), encoding="utf-8")
        os.replace(unfinished, file)
    except OSError as error:
        raise SliderError(f"The scores cannot be written to {file}: {error}. Make room there.") from error
