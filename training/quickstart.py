"""Writes everything for a first training run on the CPU: a tiny model with random weights, images and a config.

The run shows that the installation trains, resumes and writes files that the nodes load. The random model cannot edit.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.ldm.flux.model
import comfy.ops
import comfy.taesd.taesd
import comfy.text_encoders.t5
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 64,
    "hidden_size": 128,
    "num_heads": 1,
    "depth": 2,
    "depth_single_blocks": 2,
    "mlp_ratio": 4.0,
    "axes_dim": [16, 56, 56],
    "txt_ids_dims": [],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
_CLIP_L = {
    "num_hidden_layers": 2,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 256,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}
_T5 = {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 64,
    "num_heads": 1,
    "num_layers": 2,
    "vocab_size": 32128,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "t5",
}
_COLORS = ("crimson", "gold", "seagreen", "royalblue", "orchid", "slategray", "black", "linen")


def write_quickstart(folder: Path, num_images: int = 40) -> Path:
    """Write models/, images/ and quickstart.yaml into `folder`. Returns the path of quickstart.yaml."""
    modules = {
        "diffusion_models/quickstart-flux": _build(comfy.ldm.flux.model.Flux, **_FLUX),
        "text_encoders/quickstart-clip-l": _build(comfy.clip_model.CLIPTextModel, _CLIP_L),
        "text_encoders/quickstart-t5": _build(comfy.text_encoders.t5.T5, _T5),
        "vae_approx/taef1_encoder": comfy.taesd.taesd.Encoder(latent_channels=16),
        "vae_approx/taef1_decoder": comfy.taesd.taesd.Decoder(latent_channels=16),
    }
    for name, module in modules.items():
        file = folder / "models" / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(_random_weights(module.state_dict()), file)
    (folder / "images").mkdir(exist_ok=True)
    for k in range(num_images):
        _image(k).save(folder / "images" / f"{k:03}.png")
    config = folder / "quickstart.yaml"
    example = Path(__file__).parent / "configs" / "quickstart.yaml"
    config.write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    return config


def _build(module: Any, *config: Any, **options: Any) -> torch.nn.Module:
    return module(*config, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast, **options)


def _random_weights(like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms are 1, biases 0, other weights normal with variance 1 / fan-in, seeded by their names."""
    tensors = {}
    for name, tensor in like.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if tensor.ndim < 2:
            value = torch.zeros(tensor.shape) if name.endswith("bias") else torch.ones(tensor.shape)
        else:
            value = torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor[0].numel())
        tensors[name] = value
    return tensors


def _image(seed: int) -> Image.Image:
    """A circle and a square on a plain background, 64 x 64 pixels."""
    rng = random.Random(seed)
    background, *colors = rng.sample(_COLORS, 3)
    image = Image.new("RGB", (64, 64), background)
    draw = ImageDraw.Draw(image)
    for color, shape in zip(colors, (draw.ellipse, draw.rectangle)):
        left, top, size = rng.randrange(4, 40), rng.randrange(4, 40), rng.randrange(12, 24)
        shape((left, top, left + size, top + size), fill=color)
    return image
