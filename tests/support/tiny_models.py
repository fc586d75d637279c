"""Tiny FLUX.1 Kontext, text encoders, autoencoder and slider adapters that the stock loaders accept.

The weights are random but reproducible. The autoencoder really encodes and decodes, at a low resolution: decoded images
are blurred.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

MODEL = {
    "seed": 11,
    "hidden": 128,
    "latent_channels": 16,
    "context_in_dim": 64,
    "vec_in_dim": 768,
    "depth": 2,
    "depth_single_blocks": 2,
}
STLORA = {"which": "stlora", "rank": 4, "seed": 12, "gain": 4.0, "prefix": ""}
GSTLORA = {"which": "full", "rank": 4, "seed": 13, "gain": 0.2, "prefix": ""}
PROJECTOR = {"seed": 15, "out_dim": 256, "n_layers": 4}
PROJECTOR_LORA = {"which": "full", "rank": 4, "seed": 16, "gain": 0.2, "prefix": ""}
PLAIN_LORA = {"rank": 4, "alpha": 2.0, "seed": 14, "gain": 0.3}

_RECIPE = Path(__file__).parents[1] / "data" / "golden" / "recipe.py"
_IMAGE_LAYERS = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
}
_TEXT_LAYERS = {
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_BLOCK_LISTS = {
    "transformer_blocks": ("double_blocks", _IMAGE_LAYERS | _TEXT_LAYERS),
    "single_transformer_blocks": ("single_blocks", dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), "linear1")),
}
_FUSED_ORDER = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _load_recipe() -> Any:
    spec = importlib.util.spec_from_file_location("golden_recipe", _RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _load_recipe()


def write_tiny_models(models: Path) -> None:
    """Write the models into ComfyUI's models folder (about 110 MB), unless this version has already written them."""
    version = hashlib.sha256(Path(__file__).read_bytes() + _RECIPE.read_bytes()).hexdigest()
    marker = models / ".tiny-models"
    if marker.is_file() and marker.read_text() == version:
        return
    for folder in ("diffusion_models", "text_encoders", "vae_approx", "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    _save(_transformer(), models / "diffusion_models" / "tiny-kontext.safetensors")
    _save(tiny_clip_l(), models / "text_encoders" / "tiny-clip-l.safetensors")
    _save(tiny_t5(), models / "text_encoders" / "tiny-t5xxl.safetensors")
    _save(_encoder(), models / "vae_approx" / "taef1_encoder.safetensors")
    _save(_decoder(), models / "vae_approx" / "taef1_decoder.safetensors")
    _write_adapters(models / "loras")
    _write_broken_adapters(models / "loras", models / "PWNED")
    marker.write_text(version)


def _save(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)


def _write_adapters(loras: Path) -> None:
    st, gst = recipe.lora_weights(MODEL, STLORA), recipe.lora_weights(MODEL, GSTLORA)
    peft = _prefixed(gst, "transformer.")
    doubled = {"lora_adapter_metadata": json.dumps({"transformer.r": GSTLORA["rank"], "transformer.lora_alpha": 8})}
    torch.save(st, loras / "selective_lora.pt")
    _save(_comfy_names(_fused(st)), loras / "st_comfy_names.safetensors")
    _save(peft, loras / "gst_peft.safetensors")
    _save(peft, loras / "gst_peft_alpha.safetensors", doubled)
    _save(_kohya_names(_fused(gst)), loras / "gst_kohya.safetensors")
    _save(_comfy_names(_fused(gst)), loras / "gst_comfy_names.safetensors")
    _save(_kohya_names(_plain_lora()), loras / "plain_lora.safetensors")
    projector = recipe.projector_weights(MODEL, PROJECTOR)
    lora = _prefixed(recipe.lora_weights(MODEL, PROJECTOR_LORA), "transformer.")
    torch.save(projector, loras / "slider_projector.pth")
    _save(lora, loras / "projector_lora.safetensors", doubled)
    _save(projector | lora, loras / "projector_bundle.safetensors", doubled)


def _write_broken_adapters(loras: Path, pwned: Path) -> None:
    peft = _prefixed(recipe.lora_weights(MODEL, GSTLORA), "transformer.")
    scales = {
        key.replace("lora_B.weight", "dora_scale"): torch.ones(up.shape[0], 1)
        for key, up in peft.items()
        if "lora_B" in key
    }
    wide = recipe.lora_weights({**MODEL, "hidden": 256}, GSTLORA)
    deep = {key.replace("transformer_blocks.1.", "transformer_blocks.7."): value for key, value in peft.items()}
    _save(peft | scales, loras / "dora.safetensors")
    _save(_prefixed(wide, "transformer."), loras / "wrong_width.safetensors")
    _save(deep, loras / "too_deep.safetensors")
    _save(_kohya_names(_sdxl_lora()), loras / "other_family.safetensors")
    complete = (loras / "gst_peft.safetensors").read_bytes()
    (loras / "truncated.safetensors").write_bytes(complete[: len(complete) // 2])
    (loras / "empty.safetensors").write_bytes(b"")
    torch.save({"lora": _Hostile(pwned)}, loras / "hostile.pt")
    torch.save(recipe.projector_weights(MODEL, PROJECTOR | {"out_dim": 512}), loras / "wide_projector.pth")
    torch.save([torch.zeros(4, 4)], loras / "not_a_dict.pt")
    torch.save({"step": 3, "name": "adapter"}, loras / "no_tensors.pt")


class _Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._trace), "w")


def _transformer() -> Tensors:
    """The recipe's weights with one velocity for all 2 x 2 latents of a patch: edits appear as color, not as a grid."""
    sd = recipe.flux_weights(MODEL)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        patches = sd[key].unflatten(0, (MODEL["latent_channels"], 4))
        sd[key] = (2 * patches.mean(1, keepdim=True)).expand_as(patches).flatten(0, 1)
    return sd


# --- adapters: ComfyUI's module name -> (down, up, alpha)
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]


def _fused(diffusers: Tensors) -> Factors:
    """Fuse separate q, k, v factors into one pair with the same product: downs concatenated, ups block-diagonal."""
    factors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)
    for key, down in diffusers.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        block_list, block, layer = name.split(".", 2)
        comfy_blocks, layers = _BLOCK_LISTS[block_list]
        factors[f"{comfy_blocks}.{block}.{layers[layer]}"][layer] = (down, diffusers[f"{name}.lora_B.weight"])
    fused = {}
    for module, pairs in factors.items():
        ordered = [pairs[layer] for layer in _FUSED_ORDER if layer in pairs] or list(pairs.values())
        down = torch.cat([d for d, _ in ordered])
        up = torch.block_diag(*[u for _, u in ordered])
        if module.endswith("linear1"):
            up = torch.cat([up, up.new_zeros(4 * MODEL["hidden"], up.shape[1])])
        fused[module] = (down, up, float(down.shape[0]))
    return fused


def _plain_lora() -> Factors:
    layers = [
        f"double_blocks.{b}.{layer}"
        for b in range(2)
        for layer in sorted({*_BLOCK_LISTS["transformer_blocks"][1].values()})
    ]
    layers += [f"single_blocks.{b}.{layer}" for b in range(2) for layer in ("linear1", "linear2")]
    shapes = recipe.flux_shapes(MODEL)
    return {layer: _random_pair(layer, *shapes[f"{layer}.weight"]) for layer in layers}


def _sdxl_lora() -> Factors:
    layers = ("input_blocks.4.1.proj_in", "input_blocks.4.1.transformer_blocks.0.attn1.to_q", "middle_block.1.proj_out")
    return {layer: _random_pair(layer, 640, 640) for layer in layers}


def _random_pair(name: str, out: int, width: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    rank = int(PLAIN_LORA["rank"])
    down = recipe.draw(f"{name}.down", (rank, width), PLAIN_LORA["seed"], 1 / math.sqrt(width))
    up = recipe.draw(f"{name}.up", (out, rank), PLAIN_LORA["seed"], PLAIN_LORA["gain"] / math.sqrt(rank))
    return down, up, PLAIN_LORA["alpha"]


def _prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def _comfy_names(factors: Factors) -> Tensors:
    return _lora_keys((f"diffusion_model.{module}", pair) for module, pair in factors.items())


def _kohya_names(factors: Factors) -> Tensors:
    return _lora_keys((f"lora_unet_{module.replace('.', '_')}", pair) for module, pair in factors.items())


def _lora_keys(named_factors: Iterable[tuple[str, tuple[torch.Tensor, torch.Tensor, float]]]) -> Tensors:
    tensors = {}
    for name, (down, up, alpha) in named_factors:
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


# --- text encoders
def _linear(name: str, out: int, width: int, bias: bool) -> Tensors:
    tensors = {f"{name}.weight": recipe.draw(name, (out, width), MODEL["seed"], 1 / math.sqrt(width))}
    return tensors | {f"{name}.bias": torch.zeros(out)} if bias else tensors


def tiny_clip_l(hidden: int = 768, mlp: int = 256, layers: int = 2) -> Tensors:
    """CLIP-L with its projection."""
    norms = ["final_layer_norm"]
    sd = _linear("text_projection", hidden, hidden, bias=False)
    for name, num_embeddings in (("token", 49408), ("position", 77)):
        key = f"text_model.embeddings.{name}_embedding.weight"
        sd[key] = recipe.draw(key, (num_embeddings, hidden), MODEL["seed"], 0.5)
    for layer in range(layers):
        block = f"encoder.layers.{layer}"
        norms += [f"{block}.layer_norm1", f"{block}.layer_norm2"]
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sd |= _linear(f"text_model.{block}.self_attn.{projection}", hidden, hidden, bias=True)
        sd |= _linear(f"text_model.{block}.mlp.fc1", mlp, hidden, bias=True)
        sd |= _linear(f"text_model.{block}.mlp.fc2", hidden, mlp, bias=True)
    for norm in norms:
        sd |= {f"text_model.{norm}.weight": torch.ones(hidden), f"text_model.{norm}.bias": torch.zeros(hidden)}
    return {key: tensor.half() for key, tensor in sd.items()}


def tiny_t5(width: int = 64, mlp: int = 128, layers: int = 2) -> Tensors:
    sd = {"shared.weight": recipe.draw("t5.shared", (32128, width), MODEL["seed"])}
    sd["encoder.final_layer_norm.weight"] = torch.ones(width)
    sd["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = recipe.draw("t5.bias", (32, 1), 0)
    for layer in range(layers):
        block = f"encoder.block.{layer}.layer"
        for projection in ("q", "k", "v", "o"):
            sd |= _linear(f"{block}.0.SelfAttention.{projection}", width, width, bias=False)
        sd |= _linear(f"{block}.1.DenseReluDense.wi_0", mlp, width, bias=False)
        sd |= _linear(f"{block}.1.DenseReluDense.wi_1", mlp, width, bias=False)
        sd |= _linear(f"{block}.1.DenseReluDense.wo", width, mlp, bias=False)
        sd |= {f"{block}.{sublayer}.layer_norm.weight": torch.ones(width) for sublayer in (0, 1)}
    return {key: tensor.half() for key, tensor in sd.items()}


# --- autoencoder in TAESD's layout. A block with zero convolutions is the identity for non-negative values.
_CONTRAST = 4.0  # latent units per unit of color; the latents' standard deviation is about 1


def _color_axes() -> torch.Tensor:
    """(16, 3): orthonormal directions of red, green and blue in the latent channels."""
    return torch.linalg.qr(recipe.draw("colours", (16, 3), MODEL["seed"])).Q


def _encoder() -> Tensors:
    sd = _zero_blocks((1, 3, 4, 5, 7, 8, 9, 11, 12, 13))
    first, last = torch.zeros(64, 3, 3, 3), torch.zeros(16, 64, 3, 3)
    halve = torch.zeros(64, 64, 3, 3)
    for color in range(3):
        first[color, color, 1, 1] = 1
        halve[color, color, 1:, 1:] = 0.25
    last[:, :3, 1, 1] = _CONTRAST * _color_axes()
    sd |= {"0.weight": first, "0.bias": torch.zeros(64), "14.weight": last, "14.bias": -0.5 * last.sum((1, 2, 3))}
    return sd | {f"{layer}.weight": halve.clone() for layer in (2, 6, 10)}


def _decoder() -> Tensors:
    sd = _zero_blocks((3, 4, 5, 8, 9, 10, 13, 14, 15, 18))
    first, last = torch.zeros(64, 16, 3, 3), torch.zeros(3, 64, 3, 3)
    smooth = torch.zeros(64, 64, 3, 3)
    kernel = torch.tensor([0.25, 0.5, 0.25])
    for sign in (1, -1):  # channels 3 to 5 carry values below gray
        for color in range(3):
            channel = color if sign > 0 else color + 3
            first[channel, :, 1, 1] = sign * _color_axes()[:, color] / _CONTRAST
            smooth[channel, channel] = torch.outer(kernel, kernel)
            last[color, channel, 1, 1] = sign
    sd |= {"1.weight": first, "1.bias": torch.zeros(64), "19.weight": last, "19.bias": torch.full((3,), 0.5)}
    return sd | {f"{layer}.weight": smooth.clone() for layer in (7, 12, 17)}


def _zero_blocks(layers: Iterable[int]) -> Tensors:
    convolutions = [f"{layer}.conv.{i}" for layer in layers for i in (0, 2, 4)]
    weights = {f"{name}.weight": torch.zeros(64, 64, 3, 3) for name in convolutions}
    return weights | {f"{name}.bias": torch.zeros(64) for name in convolutions}


def tiny_vae() -> Any:
    """The autoencoder as VAELoader loads 'taef1', a comfy.sd.VAE."""
    import comfy.sd

    sd = {f"taesd_encoder.{key}": value for key, value in _encoder().items()}
    sd |= {f"taesd_decoder.{key}": value for key, value in _decoder().items()}
    return comfy.sd.VAE(sd=sd | {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)})
