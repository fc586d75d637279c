"""On-disk cache of VAE latents and encoded prompts.

File names contain a hash of everything that the content depends on, so changed images, prompts and models are encoded
again.
"""

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
from .config import ModelConfig
from .errors import TrainingError
from .examples import ImageFile, pil_to_tensor, resize_to_area
from .frozen_model import Text

_SPLITTER = "one per line"
_CHUNK_BYTES = 1 << 20
_NUM_CHUNKS = 16
_FORMER_KEYS = {"pictures": "images", "text encoders": "text_encoders"}
"""Keys in manifests of earlier versions -> their current names."""
_LOG = logging.getLogger(__name__)

Prompt = tuple[str, ...]
"""The instructions of a prompt, in order; () = empty prompt."""

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


class EncodedPrompt(NamedTuple):
    """text: batch size 1. tokens: for each instruction, the indices of its text tokens."""

    text: Text
    tokens: tuple[tuple[int, ...], ...]


class SampleCache:
    """Latents and encoded prompts of one VAE and one pair of text encoders, on the CPU.

    folder: gets latents/, texts/ and manifest.json, the hashes of the inputs so far. dtype: of encoded prompts.
    encoder: ComfyUI's name of the encoder whose output tokens are the model's text tokens.
    """

    def __init__(self, folder: Path, config: ModelConfig, resolution: int, dtype: torch.dtype, encoder: str):
        self.folder, self.config, self.resolution, self.dtype, self.encoder = folder, config, resolution, dtype, encoder
        for name in ("latents", "texts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        manifest = _read_json(folder / "manifest.json")
        self.manifest = {_FORMER_KEYS.get(key, key): value for key, value in manifest.items()}
        self._vae = _vae_fingerprint(config.vae)
        options = json.dumps(config.text_encoder_options, sort_keys=True)
        encoders = [_fingerprint(model_file("text_encoders", name)) for name in config.text_encoders]
        self._encoders = f"{encoders} {options} {dtype} {config.max_sequence_length}"
        self._image_hashes: dict[Path, str] = {}

    def latent(self, image: ImageFile) -> torch.Tensor:
        """The VAE latent of an image, (1, channels, height, width)."""
        return load_file(self._latent_file(image))["latent"]

    def prompt(self, prompt: Prompt) -> EncodedPrompt:
        tensors = load_file(self._text_file(prompt))
        tokens = tuple(tuple(tensors[f"rows.{k}"].tolist()) for k in range(len(prompt)))
        return EncodedPrompt(Text(tensors["states"], tensors["pooled"]), tokens)

    def fill_latents(self, images: Iterable[ImageFile], on_progress: Progress) -> dict[ImageFile, str]:
        """Encode the images that are not in the cache. Returns the unreadable images with the reason."""
        missing, unreadable = [], {}
        for image in dict.fromkeys(images):
            try:
                file = self._latent_file(image)
            except OSError as error:
                unreadable[image] = str(error)
                continue
            if not _is_complete(file):
                missing.append(image)
        self._warn_of_changes("images", {str(path): digest for path, digest in self._image_hashes.items()})
        if missing:
            vae = load_vae(self.config.vae)
            for done, image in enumerate(missing, 1):
                try:
                    pixels = pil_to_tensor([resize_to_area(image.open(), self.resolution)])
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    unreadable[image] = str(error)
                    continue
                with torch.inference_mode():
                    latent = vae.encode(pixels)
                _save({"latent": latent.float().cpu()}, self._latent_file(image))
                on_progress("images", done, len(missing))
            del vae
            release_models()
        return unreadable

    def fill_texts(self, prompts: Iterable[Prompt], on_progress: Progress) -> None:
        """Encode the prompts that are not in the cache. Raises TrainingError naming an instruction without tokens."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if not _is_complete(self._text_file(prompt))]
        self._warn_of_changes("text_encoders", {"text encoders": self._encoders})
        if missing:
            clip = load_text_encoders(self.config)
            for done, prompt in enumerate(missing, 1):
                _save(self._encode(clip, prompt), self._text_file(prompt))
                on_progress("prompts", done, len(missing))
            del clip
            release_models()

    def _encode(self, clip: comfy.sd.CLIP, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Encode a prompt as the nodes do: joined, padded to max_sequence_length, with one span per instruction."""
        spans: Sequence[Span] = ()
        length = self.config.max_sequence_length
        with torch.inference_mode():
            if prompt:
                try:
                    encoded = encode_instructions(clip, "\n".join(prompt), _SPLITTER, length)
                except SliderError as error:
                    raise TrainingError(f"The instructions {list(prompt)} cannot be encoded: {error}") from error
                conditioning, spans = encoded.conditioning, encoded.spans
            else:
                options = {f"{self.encoder}_min_length": length}
                conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("", tokenizer_options=options))
        [[states, options]] = conditioning
        tokens = {f"rows.{k}": torch.tensor(span.tokens, dtype=torch.int32) for k, span in enumerate(spans)}
        pooled = options["pooled_output"]
        return {"states": states.to("cpu", self.dtype), "pooled": pooled.to("cpu", self.dtype), **tokens}

    def _warn_of_changes(self, what: str, hashes: Mapping[str, str]) -> None:
        """Warn when inputs have other hashes than in the manifest, and update the manifest."""
        before: dict[str, str] = self.manifest.get(what, {})
        changed = [name for name, digest in hashes.items() if before.get(name, digest) != digest]
        if changed:
            kind = what.replace("_", " ")
            _LOG.warning("%d %s changed since they were encoded, for example %s.", len(changed), kind, changed[0])
        if before == {**before, **hashes}:
            return
        self.manifest[what] = {**before, **hashes}
        atomic_write(self.folder / "manifest.json", json.dumps(self.manifest, indent=1).encode())

    def _latent_file(self, image: ImageFile) -> Path:
        if image.file not in self._image_hashes:
            self._image_hashes[image.file] = hashlib.sha256(image.file.read_bytes()).hexdigest()
        inputs = (
            self._image_hashes[image.file],
            "upright",
            image.column,
            image.num_columns,
            self.resolution,
            self._vae,
        )
        return self.folder / "latents" / f"{_digest(inputs)}.safetensors"

    def _text_file(self, prompt: Prompt) -> Path:
        return self.folder / "texts" / f"{_digest((prompt, self._encoders))}.safetensors"


def load_vae(name: str) -> comfy.sd.VAE:
    """Load a VAE given by path or by its name in ComfyUI's Load VAE node, which includes names such as 'taef1'."""
    if Path(name).expanduser().is_file():
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(Path(name).expanduser()), safe_load=True))
    import nodes

    if not hasattr(nodes, "VAELoader"):
        raise TrainingError(
            f"The module 'nodes' is {nodes.__file__}; expected ComfyUI's. Import it after use_comfyui, which puts "
            "ComfyUI first on sys.path."
        )
    names = nodes.VAELoader.vae_list(nodes.VAELoader)
    if name not in names:
        raise TrainingError(f"model.vae {name!r} is not in ComfyUI's model folders, which contain {', '.join(names)}.")
    return nodes.VAELoader().load_vae(name)[0]


def load_text_encoders(config: ModelConfig) -> comfy.sd.CLIP:
    paths = [model_file("text_encoders", name) for name in config.text_encoders]
    return comfy.sd.load_text_encoder_state_dicts(
        [comfy.utils.load_torch_file(str(path), safe_load=True) for path in paths],
        clip_type=comfy.sd.CLIPType.FLUX,
        model_options=dict(config.text_encoder_options),
    )


def release_models() -> None:
    """Unload all models and free the memory of those that are no longer referenced."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.cleanup_models()
    comfy.model_management.soft_empty_cache()


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    atomic_write(file, save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}))


def _is_complete(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):  # compares the file's length with its header
            return True
    except (OSError, SafetensorError):
        return False


def _vae_fingerprint(name: str) -> str:
    if Path(name).expanduser().is_file():
        return _fingerprint(Path(name).expanduser())
    import folder_paths

    if file := folder_paths.get_full_path("vae", name):
        return _fingerprint(Path(file))
    files = (file for file in folder_paths.get_filename_list("vae_approx") if file.startswith(name))
    return " ".join(_fingerprint(model_file("vae_approx", file)) for file in sorted(files))


def _fingerprint(file: Path) -> str:
    """Hash of a model file's size and of evenly spaced chunks of it."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        for k in range(_NUM_CHUNKS):
            content.seek(k * max(size - _CHUNK_BYTES, 0) // (_NUM_CHUNKS - 1))
            digest.update(content.read(_CHUNK_BYTES))
    return digest.hexdigest()


def _digest(inputs: object) -> str:
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:40]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
