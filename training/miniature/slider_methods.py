"""Sliders on the miniature model: pictures at many strengths by every method, through ComfyUI's own sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.adapters.strength_projector import apply_projector, read_projector, set_projector_strength
from slider_core.conditioning.span_strengths import set_strengths
from slider_core.sampling.flow_matching import scheduler_sigmas
from slider_core.text.encode import encode_instructions
from slider_core.training_free.attention_reweighting import apply_attention_reweighting
from slider_core.training_free.flowslider import sample_flowslider
from slider_core.training_free.prompt_difference import encode_differences
from slider_core.training_free.text_modulation import apply_text_modulation
from slider_core.training_free.token_interpolation import apply_token_interpolation
from slider_core.training_free.velocity_blending import blend_velocity
from slider_core.types import Conditioning

from ..objectives import NEUTRAL
from ..rng import generator
from .autoencoder import as_pixels
from .edits import Edit
from .model import CLIP_L, DECODER, ENCODER, T5, TRANSFORMER
from .synthetic_scenes import Scene
from .text_encoders import ENCODER_OPTIONS

ROWS = 32
STEPS = 8
GUIDANCE = 3.5


class Slid(NamedTuple):
    """What a method makes of a prompt: one picture per strength.

    cfg: classifier-free guidance, one per picture. blended: strengths of blending with the source, one per picture.
    steered: strengths of steering away from what the negative prompt says of the source, one per picture.
    """

    model: ModelPatcher
    positive: Conditioning
    negative: Conditioning | None = None
    cfg: Sequence[float] | None = None
    blended: Sequence[float] | None = None
    steered: Sequence[float] | None = None


class Miniature:
    """The files of a models folder, loaded by ComfyUI; adapters are those in its loras."""

    def __init__(self, models: Path):
        self.loras = models / "loras"
        self.model = comfy.sd.load_diffusion_model(str(models / TRANSFORMER))
        encoders = [comfy.utils.load_torch_file(str(models / name), safe_load=True) for name in (CLIP_L, T5)]
        options = {name: dict(values) for name, values in ENCODER_OPTIONS.items()}
        self.clip = comfy.sd.load_text_encoder_state_dicts(
            encoders, clip_type=comfy.sd.CLIPType.FLUX, model_options=options
        )
        self.clip.set_tokenizer_option("t5xxl_min_length", ROWS)
        self.vae = _vae(models)

    def prompt(self, instructions: Sequence[str]) -> Conditioning:
        """The instructions joined, each a span; none gives the empty prompt."""
        if not instructions:
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(""))
        return encode_instructions(self.clip, "\n".join(instructions), "one per line", None).conditioning

    @torch.inference_mode()
    def latent(self, source: Scene) -> Tensor:
        return self.vae.encode(as_pixels(source).movedim(0, -1)[None])

    def beside(self, conditioning: Conditioning, latent: Tensor) -> Conditioning:
        """The conditioning of an edit of the picture with this latent."""
        more = {"reference_latents": [latent], "reference_latents_method": "offset", "guidance": GUIDANCE}
        return [[states, {**options, **more}] for states, options in conditioning]

    @torch.inference_mode()
    def pictures(self, source: Scene, slid: Slid, count: int, seed: str = "sliding") -> np.ndarray:
        """(count, SIDE, SIDE, 3), all from the same noise, which the seed tells."""
        latent = self.latent(source)
        noise = torch.randn(latent.shape, generator=generator(seed)).expand(count, -1, -1, -1).contiguous()
        positive = self.beside(slid.positive, latent)
        if slid.negative is None:
            model = blend_velocity(slid.model, latent, tuple(slid.blended)) if slid.blended else slid.model
            return self._decoded(_sampled(model, positive, positive, noise, 1.0))
        negative = self.beside(slid.negative, latent)
        if slid.steered:
            sigmas = scheduler_sigmas(slid.model, "simple", STEPS)
            return self._decoded(
                sample_flowslider(slid.model, negative, positive, latent, noise[:1], tuple(slid.steered), sigmas)
            )
        assert slid.cfg is not None
        each = [_sampled(slid.model, positive, negative, noise[:1], cfg) for cfg in slid.cfg]
        return self._decoded(torch.cat(each))

    def _decoded(self, latents: Tensor) -> np.ndarray:
        return self.vae.decode(latents).clamp(0, 1).numpy()


Method = Callable[[Miniature, Sequence[Edit], int, Sequence[float]], Slid]
"""(miniature, edits, which of them is moved, its strengths) to what makes the pictures; the others stay at 1."""


def stlora(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    adapter = read_adapter(it.loras / "miniature-stlora.safetensors")
    return Slid(apply_stlora(it.model, adapter), _only_one_moves(it, edits, moved, strengths))


def gstlora(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    adapter = read_adapter(it.loras / "miniature-gstlora.safetensors")
    return Slid(apply_gstlora(it.model, adapter, list(strengths)), it.prompt(_told(edits)))


def projector(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    read = read_projector(it.loras / "miniature-projector.safetensors")
    conditioning = set_projector_strength(it.prompt(_told(edits)), read, list(strengths))
    return Slid(apply_projector(it.model, read), conditioning)


def text_modulation(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    return Slid(apply_text_modulation(it.model), _only_one_moves(it, edits, moved, strengths))


def attention_to_text(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    from_none = [max(strength, 0.0) for strength in strengths]
    return Slid(apply_attention_reweighting(it.model), _only_one_moves(it, edits, moved, from_none))


def token_interpolation(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    return Slid(apply_token_interpolation(it.model), _only_one_moves(it, edits, moved, strengths))


def velocity_blending(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    return Slid(it.model, it.prompt(_told(edits)), blended=strengths)


def fidelity_steering(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    return Slid(it.model, it.prompt(_told(edits)), it.prompt(NEUTRAL), steered=strengths)


def prompt_difference(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    differences = encode_differences(it.clip, "\n".join(_told(edits)), "one per line", None)
    return Slid(it.model, differences.with_strengths(_values(edits, moved, strengths)))


def guidance_scale(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    return Slid(it.model, it.prompt(_told(edits)), it.prompt(()), list(strengths))


def embedding_interpolation(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Slid:
    """Between the encoded prompt and the one without the moved instruction."""
    [[whole, options]] = it.prompt(_told(edits))
    [[without, other]] = it.prompt(_told([edit for k, edit in enumerate(edits) if k != moved]))
    share = torch.tensor(strengths)[:, None, None]
    pooled = torch.lerp(other["pooled_output"], options["pooled_output"], share[:, 0])
    return Slid(it.model, [[torch.lerp(without, whole, share), {**options, "pooled_output": pooled}]])


METHODS: dict[str, Method] = {
    "STLoRA": stlora,
    "GSTLoRA": gstlora,
    "strength projector": projector,
    "text modulation": text_modulation,
    "attention to text": attention_to_text,
    "token interpolation": token_interpolation,
    "Velocity Blending": velocity_blending,
    "FlowSlider": fidelity_steering,
    "Prompt Difference": prompt_difference,
    "guidance scale": guidance_scale,
    "embedding interpolation": embedding_interpolation,
}
"""By name; the last two are what one would do without this pack."""


def _told(edits: Sequence[Edit]) -> list[str]:
    return [edit.instruction for edit in edits]


def _only_one_moves(it: Miniature, edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> Conditioning:
    return set_strengths(it.prompt(_told(edits)), _values(edits, moved, strengths))


def _values(edits: Sequence[Edit], moved: int, strengths: Sequence[float]) -> dict[str, object]:
    return {f"strength_{k + 1}": list(strengths) if k == moved else 1.0 for k in range(len(edits))}


def _sampled(model: ModelPatcher, positive: Conditioning, negative: Conditioning, noise: Tensor, cfg: float) -> Tensor:
    empty = torch.zeros_like(noise)
    return comfy.sample.sample(
        model, noise, STEPS, cfg, "euler", "simple", positive, negative, empty, disable_pbar=True
    )


def _vae(models: Path) -> comfy.sd.VAE:
    weights: dict[str, Tensor] = {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}  # FLUX.1's
    for part, name in (("taesd_encoder", ENCODER), ("taesd_decoder", DECODER)):
        read = comfy.utils.load_torch_file(str(models / name), safe_load=True)
        weights |= {f"{part}.{key}": value for key, value in read.items()}
    return comfy.sd.VAE(sd=weights)
