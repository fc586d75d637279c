"""All slider methods on the miniature model, rendered at several strengths with ComfyUI's sampler."""

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

from ..objectives import NEUTRAL_PROMPT
from ..rng import generator
from .autoencoder import scene_to_tensor
from .edits import Edit
from .model import CLIP_L, DECODER, ENCODER, T5, TRANSFORMER
from .synthetic_scenes import Scene
from .text_encoders import ENCODER_OPTIONS

NUM_TEXT_TOKENS = 32
STEPS = 8
GUIDANCE = 3.5


class SliderSetup(NamedTuple):
    """Model and conditioning of a method, for a batch with one image per strength.

    Without `negative`: sampled without guidance; blend_strengths: strengths of velocity blending, one per image.
    With `negative`: either cfg_scales or flowslider_strengths, one per image.
    """

    model: ModelPatcher
    positive: Conditioning
    negative: Conditioning | None = None
    cfg_scales: Sequence[float] | None = None
    blend_strengths: Sequence[float] | None = None
    flowslider_strengths: Sequence[float] | None = None


class Miniature:
    """The miniature model in a ComfyUI models folder, loaded by ComfyUI; its adapters are in loras/."""

    def __init__(self, models: Path):
        self.loras = models / "loras"
        self.model = comfy.sd.load_diffusion_model(str(models / TRANSFORMER))
        encoders = [comfy.utils.load_torch_file(str(models / name), safe_load=True) for name in (CLIP_L, T5)]
        options = {name: dict(values) for name, values in ENCODER_OPTIONS.items()}
        self.clip = comfy.sd.load_text_encoder_state_dicts(
            encoders, clip_type=comfy.sd.CLIPType.FLUX, model_options=options
        )
        self.clip.set_tokenizer_option("t5xxl_min_length", NUM_TEXT_TOKENS)
        self.vae = _load_vae(models)

    def prompt(self, instructions: Sequence[str]) -> Conditioning:
        """The encoded prompt of joined instructions, with a span for each; the empty prompt if there are none."""
        if not instructions:
            return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(""))
        return encode_instructions(self.clip, "\n".join(instructions), "one per line", None).conditioning

    @torch.inference_mode()
    def latent(self, source: Scene) -> Tensor:
        return self.vae.encode(scene_to_tensor(source).movedim(0, -1)[None])

    def edit_conditioning(self, conditioning: Conditioning, latent: Tensor) -> Conditioning:
        """The conditioning with `latent` as reference latent, and guidance."""
        edit_options = {"reference_latents": [latent], "reference_latents_method": "offset", "guidance": GUIDANCE}
        return [[states, {**options, **edit_options}] for states, options in conditioning]

    @torch.inference_mode()
    def render(self, source: Scene, setup: SliderSetup, count: int, seed: str = "sliding") -> np.ndarray:
        """Edit a scene `count` times from the same noise: (count, SIDE, SIDE, 3), 0 to 1."""
        latent = self.latent(source)
        noise = torch.randn(latent.shape, generator=generator(seed)).expand(count, -1, -1, -1).contiguous()
        positive = self.edit_conditioning(setup.positive, latent)
        model = setup.model
        if setup.negative is None:
            if setup.blend_strengths:
                model = blend_velocity(model, latent, tuple(setup.blend_strengths))
            return self._decode(_sample(model, positive, positive, noise, 1.0))
        negative = self.edit_conditioning(setup.negative, latent)
        if setup.flowslider_strengths:
            sigmas = scheduler_sigmas(model, "simple", STEPS)
            strengths = tuple(setup.flowslider_strengths)
            return self._decode(sample_flowslider(model, negative, positive, latent, noise[:1], strengths, sigmas))
        assert setup.cfg_scales is not None
        latents = [_sample(model, positive, negative, noise[:1], scale) for scale in setup.cfg_scales]
        return self._decode(torch.cat(latents))

    def _decode(self, latents: Tensor) -> np.ndarray:
        return self.vae.decode(latents).clamp(0, 1).numpy()


Method = Callable[[Miniature, Sequence[Edit], int, Sequence[float]], SliderSetup]
"""(miniature, edits, index of the edit with a slider, its strengths) -> setup. The other edits have strength 1."""


def stlora(miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]) -> SliderSetup:
    adapter = read_adapter(miniature.loras / "miniature-stlora.safetensors")
    return SliderSetup(apply_stlora(miniature.model, adapter), _with_slider(miniature, edits, index, strengths))


def gstlora(miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]) -> SliderSetup:
    adapter = read_adapter(miniature.loras / "miniature-gstlora.safetensors")
    return SliderSetup(apply_gstlora(miniature.model, adapter, list(strengths)), miniature.prompt(_instructions(edits)))


def projector(miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]) -> SliderSetup:
    bundle = read_projector(miniature.loras / "miniature-projector.safetensors")
    conditioning = set_projector_strength(miniature.prompt(_instructions(edits)), bundle, list(strengths))
    return SliderSetup(apply_projector(miniature.model, bundle), conditioning)


def text_modulation(miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]) -> SliderSetup:
    return SliderSetup(apply_text_modulation(miniature.model), _with_slider(miniature, edits, index, strengths))


def attention_reweighting(
    miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]
) -> SliderSetup:
    non_negative = [max(strength, 0.0) for strength in strengths]
    conditioning = _with_slider(miniature, edits, index, non_negative)
    return SliderSetup(apply_attention_reweighting(miniature.model), conditioning)


def token_interpolation(
    miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]
) -> SliderSetup:
    return SliderSetup(apply_token_interpolation(miniature.model), _with_slider(miniature, edits, index, strengths))


def velocity_blending(
    miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]
) -> SliderSetup:
    return SliderSetup(miniature.model, miniature.prompt(_instructions(edits)), blend_strengths=strengths)


def flowslider(miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]) -> SliderSetup:
    prompt, neutral = miniature.prompt(_instructions(edits)), miniature.prompt(NEUTRAL_PROMPT)
    return SliderSetup(miniature.model, prompt, neutral, flowslider_strengths=strengths)


def prompt_difference(
    miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]
) -> SliderSetup:
    differences = encode_differences(miniature.clip, "\n".join(_instructions(edits)), "one per line", None)
    return SliderSetup(miniature.model, differences.with_strengths(_slider_values(edits, index, strengths)))


def guidance_scale(miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]) -> SliderSetup:
    """Classifier-free guidance against the empty prompt, with the strength as scale."""
    return SliderSetup(miniature.model, miniature.prompt(_instructions(edits)), miniature.prompt(()), list(strengths))


def embedding_interpolation(
    miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]
) -> SliderSetup:
    """Interpolation between the encoded prompts with and without the edit that has the slider."""
    [[states, options]] = miniature.prompt(_instructions(edits))
    others = [edit for k, edit in enumerate(edits) if k != index]
    [[states_without, options_without]] = miniature.prompt(_instructions(others))
    weight = torch.tensor(strengths)[:, None, None]
    pooled = torch.lerp(options_without["pooled_output"], options["pooled_output"], weight[:, 0])
    return SliderSetup(
        miniature.model, [[torch.lerp(states_without, states, weight), {**options, "pooled_output": pooled}]]
    )


METHODS: dict[str, Method] = {
    "STLoRA": stlora,
    "GSTLoRA": gstlora,
    "strength projector": projector,
    "text modulation": text_modulation,
    "attention to text": attention_reweighting,
    "token interpolation": token_interpolation,
    "Velocity Blending": velocity_blending,
    "FlowSlider": flowslider,
    "Prompt Difference": prompt_difference,
    "guidance scale": guidance_scale,
    "embedding interpolation": embedding_interpolation,
}
"""Methods by name. The last two are baselines that do not need this pack."""


def _instructions(edits: Sequence[Edit]) -> list[str]:
    return [edit.instruction for edit in edits]


def _with_slider(miniature: Miniature, edits: Sequence[Edit], index: int, strengths: Sequence[float]) -> Conditioning:
    """The encoded prompt with strengths for one edit."""
    return set_strengths(miniature.prompt(_instructions(edits)), _slider_values(edits, index, strengths))


def _slider_values(edits: Sequence[Edit], index: int, strengths: Sequence[float]) -> dict[str, object]:
    return {f"strength_{k + 1}": list(strengths) if k == index else 1.0 for k in range(len(edits))}


def _sample(model: ModelPatcher, positive: Conditioning, negative: Conditioning, noise: Tensor, cfg: float) -> Tensor:
    empty = torch.zeros_like(noise)
    return comfy.sample.sample(
        model, noise, STEPS, cfg, "euler", "simple", positive, negative, empty, disable_pbar=True
    )


def _load_vae(models: Path) -> comfy.sd.VAE:
    """A TAESD VAE of encoder and decoder, with FLUX.1's scale and shift."""
    weights: dict[str, Tensor] = {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}
    for prefix, name in (("taesd_encoder", ENCODER), ("taesd_decoder", DECODER)):
        tensors = comfy.utils.load_torch_file(str(models / name), safe_load=True)
        weights |= {f"{prefix}.{key}": value for key, value in tensors.items()}
    return comfy.sd.VAE(sd=weights)
