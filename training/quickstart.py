"""Everything a try-out on the CPU needs, made by code: pictures, and a model of random weights that knows nothing.

It shows that an installation trains, stops, goes on and writes files that the nodes load. It shows no edits.
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
_COLOURS = ("crimson", "gold", "seagreen", "royalblue", "orchid", "slategray", "black", "linen")


def write_quickstart(folder: Path, pictures: int = 40) -> Path:
    """Write models/, pictures/ and the config quickstart.yaml into `folder`; returns the config."""
    parts = {
        "diffusion_models/quickstart-flux": _module(comfy.ldm.flux.model.Flux, **_FLUX),
        "text_encoders/quickstart-clip-l": _module(comfy.clip_model.CLIPTextModel, _CLIP_L),
        "text_encoders/quickstart-t5": _module(comfy.text_encoders.t5.T5, _T5),
        "vae_approx/taef1_encoder": comfy.taesd.taesd.Encoder(latent_channels=16),
        "vae_approx/taef1_decoder": comfy.taesd.taesd.Decoder(latent_channels=16),
    }
    for name, module in parts.items():
        file = folder / "models" / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(_random(module.state_dict()), file)
    (folder / "pictures").mkdir(exist_ok=True)
    for k in range(pictures):
        _picture(k).save(folder / "pictures" / f"{k:03}.png")
    config = folder / "quickstart.yaml"
    example = Path(__file__).parent / "configs" / "quickstart.yaml"
    config.write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    return config


def _module(kind: Any, *config: Any, **more: Any) -> torch.nn.Module:
    return kind(*config, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast, **more)


def _random(shapes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms at 1, biases at 0, the rest normal by fan-in; by name alone."""
    tensors = {}
    for name, tensor in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if tensor.ndim < 2:
            value = torch.zeros(tensor.shape) if name.endswith("bias") else torch.ones(tensor.shape)
        else:
            value = torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor[0].numel())
        tensors[name] = value
    return tensors


def _picture(number: int) -> Image.Image:
    """A circle and a square on a plain ground, 64x64."""
    chance = random.Random(number)
    ground, *colours = chance.sample(_COLOURS, 3)
    picture = Image.new("RGB", (64, 64), ground)
    draw = ImageDraw.Draw(picture)
    for colour, draws in zip(colours, (draw.ellipse, draw.rectangle)):
        left, top, size = chance.randrange(4, 40), chance.randrange(4, 40), chance.randrange(12, 24)
        draws((left, top, left + size, top + size), fill=colour)
    return picture
