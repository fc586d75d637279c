"""Latents and encoded prompts on disk, made once. What they were made of is part of their names, so that a changed
picture, prompt or model is noticed and made anew."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from slider_core.atomic_write import atomic_write
from slider_core.conditioning.span_strengths import Span
from slider_core.errors import SliderError
from slider_core.text.encode import encode_instructions

from .comfyui import model_file
from .config import Base
from .errors import TrainingError
from .examples import Picture, of_pixels, resized
from .frozen_model import Text

LINES = "one per line"
_PROBED = 1 << 20
_PROBES = 16
_LOG = logging.getLogger(__name__)

Prompt = tuple[str, ...]
"""The instructions of a prompt in their order; none = empty text."""

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


class EncodedPrompt(NamedTuple):
    """text: one element. rows: for each instruction the rows of the text that it became."""

    text: Text
    rows: tuple[tuple[int, ...], ...]


class SampleCache:
    """The files of one base model's encoders.

    folder: latents/ and texts/ are made in it, and manifest.json, which tells what each file was made of.
    dtype: of encoded prompts. encoder: the one whose tokens are the rows of the model's text.
    """

    def __init__(self, folder: Path, base: Base, resolution: int, dtype: torch.dtype, encoder: str):
        self.folder, self.base, self.resolution, self.dtype, self.encoder = folder, base, resolution, dtype, encoder
        for part in ("latents", "texts"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self.manifest = _read_json(folder / "manifest.json")
        self._vae = _vae_identity(base.vae)
        options = json.dumps(base.encoder_options, sort_keys=True)
        encoders = [_identity(model_file("text_encoders", name)) for name in base.text_encoders]
        self._encoders = f"{encoders} {options} {dtype} {base.text_rows}"
        self._pictures: dict[Path, str] = {}

    def latent(self, picture: Picture) -> torch.Tensor:
        """What the VAE made of a picture, (1, channels, height, width)."""
        return load_file(self._latent_file(picture))["latent"]

    def prompt(self, prompt: Prompt) -> EncodedPrompt:
        """An encoded prompt."""
        found = load_file(self._text_file(prompt))
        rows = tuple(tuple(found[f"rows.{k}"].tolist()) for k in range(len(prompt)))
        return EncodedPrompt(Text(found["states"], found["pooled"]), rows)

    def fill_latents(self, pictures: Iterable[Picture], on_progress: Progress) -> dict[Picture, str]:
        """Encode what is not there yet. Returns the pictures that cannot be read, with the reason."""
        missing, bad = [], {}
        for picture in dict.fromkeys(pictures):
            try:
                file = self._latent_file(picture)
            except OSError as error:
                bad[picture] = str(error)
                continue
            if not _whole(file):
                missing.append(picture)
        self._tell_of_changes("pictures", {str(path): digest for path, digest in self._pictures.items()})
        if missing:
            vae = load_vae(self.base.vae)
            for done, picture in enumerate(missing, 1):
                try:
                    pixels = of_pixels([resized(picture.open(), self.resolution)])
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    bad[picture] = str(error)
                    continue
                with torch.inference_mode():
                    latent = vae.encode(pixels)
                _save({"latent": latent.float().cpu()}, self._latent_file(picture))
                on_progress("pictures", done, len(missing))
            del vae
            release_models()
        return bad

    def fill_texts(self, prompts: Iterable[Prompt], on_progress: Progress) -> None:
        """Encode what is not there yet. Raises TrainingError naming an instruction that becomes no token."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if not _whole(self._text_file(prompt))]
        self._tell_of_changes("text encoders", {"text encoders": self._encoders})
        if missing:
            clip = load_text_encoders(self.base)
            for done, prompt in enumerate(missing, 1):
                _save(self._encoded(clip, prompt), self._text_file(prompt))
                on_progress("prompts", done, len(missing))
            del clip
            release_models()

    def _encoded(self, clip: comfy.sd.CLIP, prompt: Prompt) -> dict[str, torch.Tensor]:
        """As the nodes encode it: joined, padded to the length of training, spans by the same code."""
        spans: Sequence[Span] = ()
        with torch.inference_mode():
            if prompt:
                try:
                    lines = "\n".join(prompt)
                    encoded = encode_instructions(clip, lines, LINES, self.base.text_rows)
                    conditioning, spans = encoded.conditioning, encoded.spans
                except SliderError as error:
                    raise TrainingError(f"The instructions {list(prompt)} cannot be encoded: {error}") from error
            else:
                options = {f"{self.encoder}_min_length": self.base.text_rows}
                conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("", tokenizer_options=options))
        [[states, more]] = conditioning
        rows = {f"rows.{k}": torch.tensor(span.tokens, dtype=torch.int32) for k, span in enumerate(spans)}
        return {"states": states.to("cpu", self.dtype), "pooled": more["pooled_output"].to("cpu", self.dtype), **rows}

    def _tell_of_changes(self, what: str, now: Mapping[str, str]) -> None:
        known: dict[str, str] = self.manifest.get(what, {})
        changed = [name for name, digest in now.items() if known.get(name, digest) != digest]
        if changed:
            _LOG.warning("%d %s changed since they were encoded, such as %s.", len(changed), what, changed[0])
        if known == {**known, **now}:
            return
        self.manifest[what] = {**known, **now}
        atomic_write(self.folder / "manifest.json", json.dumps(self.manifest, indent=1).encode())

    def _latent_file(self, picture: Picture) -> Path:
        if picture.file not in self._pictures:
            self._pictures[picture.file] = hashlib.sha256(picture.file.read_bytes()).hexdigest()
        of = (self._pictures[picture.file], "upright", picture.column, picture.columns, self.resolution, self._vae)
        return self.folder / "latents" / f"{_digest(of)}.safetensors"

    def _text_file(self, prompt: Prompt) -> Path:
        return self.folder / "texts" / f"{_digest((prompt, self._encoders))}.safetensors"


def load_vae(name: str) -> comfy.sd.VAE:
    """By ComfyUI's own loader: a name as its node knows it ('taef1' too), or a path."""
    if Path(name).expanduser().is_file():
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(Path(name).expanduser()), safe_load=True))
    from nodes import VAELoader  # type: ignore[attr-defined]  # ComfyUI's

    if name not in VAELoader.vae_list(VAELoader):
        raise TrainingError(
            f"base.vae {name!r} is not in ComfyUI's folder; it has {', '.join(VAELoader.vae_list(VAELoader))}."
        )
    return VAELoader().load_vae(name)[0]


def load_text_encoders(base: Base) -> comfy.sd.CLIP:
    """By ComfyUI's own loader."""
    paths = [model_file("text_encoders", name) for name in base.text_encoders]
    return comfy.sd.load_text_encoder_state_dicts(
        [comfy.utils.load_torch_file(str(path), safe_load=True) for path in paths],
        clip_type=comfy.sd.CLIPType.FLUX,
        model_options=dict(base.encoder_options),
    )


def release_models() -> None:
    """Give back the memory of models that nothing refers to any more."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.cleanup_models()
    comfy.model_management.soft_empty_cache()


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    atomic_write(file, save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}))


def _whole(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):  # compares the file's length with its header
            return True
    except (OSError, SafetensorError):
        return False


def _vae_identity(name: str) -> str:
    if Path(name).expanduser().is_file():
        return _identity(Path(name).expanduser())
    import folder_paths

    if found := folder_paths.get_full_path("vae", name):
        return _identity(Path(found))
    parts = (f for f in folder_paths.get_filename_list("vae_approx") if f.startswith(name))
    return " ".join(_identity(model_file("vae_approx", part)) for part in sorted(parts))


def _identity(file: Path) -> str:
    """Tells a model file from others without reading all of it: its size and some of its bytes."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        for k in range(_PROBES):
            content.seek(k * max(size - _PROBED, 0) // (_PROBES - 1))
            digest.update(content.read(_PROBED))
    return digest.hexdigest()


def _digest(of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:40]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
