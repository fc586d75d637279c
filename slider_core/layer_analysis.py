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

from .errors import SliderError
from .model_identity import identity_of
from .span_strengths import Conditioning
from .vital_layers import bypass, layer_count

FORMAT = "edit-sliders layer scores 1"

Features = Callable[[torch.Tensor], torch.Tensor]
"""Latent (1, channels, height, width) -> a vector that is alike for pictures that look alike."""

OnPicture = Callable[[int, int, torch.Tensor], None]
"""(pictures rendered, pictures in all, latent), called after each picture."""


@dataclass
class LayerScores:
    """Similarities of pictures with and without a layer.

    settings: what they depend on. similarities: layer -> picture -> cosine similarity, 1 = the layer does nothing.
    """

    settings: Mapping[str, Any]
    similarities: dict[int, dict[str, float]] = field(default_factory=dict)

    def similarity(self, layer: int) -> float:
        """Mean over the pictures so far."""
        values = self.similarities[layer].values()
        return sum(values) / len(values)

    def vitality(self, layer: int) -> float:
        """1 - mean similarity: 0 = the layer does nothing."""
        return 1.0 - self.similarity(layer)

    def most_vital(self, count: int) -> list[int]:
        """The `count` layers without which the pictures change most, in their order in the model."""
        if not 1 <= count <= len(self.similarities):
            raise SliderError(
                f"{count} layers were asked for; expected 1 to {len(self.similarities)}, as many as the model has."
            )
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
        return json.dumps(content, indent=1, ensure_ascii=False)


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
    file: Path,
    more_settings: Mapping[str, Any],
    on_picture: OnPicture | None = None,
) -> LayerScores:
    """Bypass each layer in turn over prompts and seeds, and compare with the whole model's picture.

    prompts: words -> conditioning. latent: (1, channels, height, width), empty. file: scores so far are kept there
    after every picture, under a name that tells the settings apart, so that an interrupted run goes on from them;
    more_settings: what else the features depend on. Renders 1 + number of layers pictures per prompt and seed, with
    ComfyUI's euler and simple. Raises SliderError without prompts, and when the file cannot be written.
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
    file = file.with_name(f"{file.name}_{_digest(settings)}.json")
    scores = _resumed(file, settings)
    layers = range(layer_count(model))
    total, rendered = len(prompts) * len(seeds) * (1 + len(layers)), 0
    for words, conditioning in prompts.items():
        for seed in seeds:
            picture = f"{words} ({seed})"
            missing = [layer for layer in layers if picture not in scores.similarities.get(layer, {})]
            rendered += len(layers) - len(missing)
            if not missing:
                rendered += 1
                continue

            def render(
                patched: ModelPatcher, conditioning: Conditioning = conditioning, seed: int = seed
            ) -> torch.Tensor:
                nonlocal rendered
                noise = comfy.sample.prepare_noise(latent, seed)
                inputs = (noise, steps, 1.0, "euler", "simple", conditioning, conditioning, latent)
                samples = comfy.sample.sample(patched, *inputs, disable_pbar=True, seed=seed)
                rendered += 1
                if on_picture is not None:
                    on_picture(rendered, total, samples)
                return features(samples)

            whole = render(model)
            for layer in missing:
                similarity = torch.cosine_similarity(whole, render(bypass(model, [layer])), dim=0).item()
                scores.similarities.setdefault(layer, {})[picture] = similarity
                _write(file, scores)
    return scores


def _fingerprint(model: ModelPatcher) -> str:
    identity = identity_of(model)
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
        known = content["format"] == FORMAT and content["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = False
    return LayerScores(settings, similarities if known else {})


def _write(file: Path, scores: LayerScores) -> None:
    unfinished = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(scores.as_json(), encoding="utf-8")
        os.replace(unfinished, file)
    except OSError as error:
        raise SliderError(f"The scores cannot be written to {file}: {error}. Make room there.") from error
