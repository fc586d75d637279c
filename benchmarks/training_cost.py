"""The cost of a training step, compared with a plain loop of diffusers and PEFT in the same process.

    python run.py benchmark [--full] [--repeats N] [--dtypes TYPE]

An STLoRA of rank 16 is trained with PPS (SliderEdit): for each sample the frozen FLUX.1 predicts the velocity for a
shortened prompt, without gradients, and the adapted model is trained to predict the same for the full prompt. Noised
source image, source as reference latent, guidance 3.5, 512 text tokens, AdamW, gradient clipping, one sample per step.
(a) the plain loop with a text encoder and a VAE that encode both prompts and the image at every step;
(b) the plain loop with encoded prompts and images kept in memory;
(c) this pack's training step (training.run.Run.train_step), which reads them from the files of its cache.

Equal: transformer weights, input sizes, gradient checkpointing of every block, optimizer, float32 LoRA factors.
Different: the pack's checkpointing also stores the attention results and does not recompute a block's output linears;
the plain LoRA acts on all text tokens instead of the suppressed ones, which PEFT does not support (the same amount of
computation); the plain loop makes its noise on the device; (a) omits the CLIP text encoder and the reading of image
files, and keeps its encoders in memory all the time.
By default 284 million random parameters at 256x256, with a text encoder (T5) and a VAE whose parameters and computation
have the same ratio to the transformer's as in FLUX.1. There text is half of the tokens, at 1024x1024 a seventeenth; so
text encoding weighs more in (a) than at the full size of FLUX.1, which --full measures, with the sizes of T5-XXL and of
FLUX.1's VAE. Medians of interleaved repeats after one warm-up round; memory in one process each. --steps is not used.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import in_training  # noqa: F401  # isort: skip
from random_flux import (  # isort: skip
    TEXT_TOKENS,
    model_size,
    options,
    peak_memory,
    print_machine,
    print_model,
    random_model,
    random_weights,
    synchronize,
)

import comfy.model_management
import psutil
from accelerate import Accelerator
from comfy.utils import flux_to_diffusers
from diffusers import AutoencoderKL, FluxTransformer2DModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from training.config import TrainingConfig
from training.examples import ImageFile
from training.frozen_model import FrozenModel, Text
from training.run import Run
from training.sample_cache import Progress, Prompt, SampleCache

RANK = 16
GUIDANCE = 3.5
ENCODING, KEPT, OURS = VARIANTS = ("(a) plain, encoding", "(b) plain, encoded", "(c) this pack")
INSTRUCTIONS = ["make it night", "make the car red", "add snow on the roofs"]
LAYERS = [
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff_context.net.0.proj",
    "ff_context.net.2",
]
SMALL_ENCODER = {"d_ff": 2048, "num_heads": 8}
FULL_ENCODER = {"d_ff": 10240, "num_heads": 64}
SMALL_VAE, FULL_VAE = (16, 32, 64, 64), (128, 256, 512, 512)

Step = Callable[[], object]


def main() -> None:
    args = options(__doc__)
    print_machine()
    peaks = {}
    for name in VARIANTS:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            peaks[name] = process.submit(_peak, name, args).result()
    with tempfile.TemporaryDirectory() as folder:
        plain, run = _Plain(args, encoders=True), _run(args, Path(folder))
        print_model(run.model.patcher, args.dtypes[0], model_size(args)[1])
        print(f"    relative difference of the velocities of both loops: {_velocity_error(plain, run):.1e}")
        _report({ENCODING: plain.encoding_step, KEPT: plain.step, OURS: run.train_step}, peaks, args.repeats)


def _report(steps: Mapping[str, Step], peaks: Mapping[str, float], repeats: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        print(f"    round {repeat} of {repeats}", file=sys.stderr)
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    print(f"\ntime and peak memory of a training step, median of {repeats}; ratios to this pack")
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(measured, times[OURS])]
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(
            f"    {name:20} {statistics.median(measured):7.3f} s    x {median:.3f} ({low:.3f} to {high:.3f})    "
            f"{peaks[name] / 2**30:6.2f} GiB    x {peaks[name] / peaks[OURS]:.3f}"
        )


def _peak(name: str, args: argparse.Namespace) -> float:
    """Peak memory of a variant's steps in bytes, including its models; to be run in a fresh process."""
    before = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        if name == OURS:
            step: Step = _run(args, Path(folder)).train_step
        else:
            plain = _Plain(args, encoders=name == ENCODING)
            step = plain.encoding_step if name == ENCODING else plain.step
        with peak_memory() as peak:
            for _ in range(2):
                step()
    return peak[0] - before


class _Plain:
    """A plain training loop with diffusers and PEFT."""

    def __init__(self, args: argparse.Namespace, encoders: bool):
        config, latent = model_size(args)
        dtype = getattr(torch, args.dtypes[0])
        self.factory_kwargs: Any = {"device": comfy.model_management.get_torch_device(), "dtype": dtype}
        self.transformer = _transformer(config, dtype)
        self.transformer.enable_gradient_checkpointing()
        self.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-5, weight_decay=1e-4)
        self.latent_size, self.width = latent, config["context_in_dim"]
        self.source = self.random(1, 16, latent, latent)
        self.pooled = self.random(1, 768)
        self.prompts = [self.random(1, TEXT_TOKENS, self.width) for _ in range(2)]
        self.text_ids = torch.zeros(TEXT_TOKENS, 3, device=self.factory_kwargs["device"])
        self.image_ids = torch.cat([_ids(latent // 2, first).to(self.factory_kwargs["device"]) for first in (0, 1)])
        if encoders:
            self._load_encoders(args)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, **self.factory_kwargs)

    def _load_encoders(self, args: argparse.Namespace) -> None:
        sizes: Mapping[str, Any] = FULL_ENCODER if args.full else SMALL_ENCODER
        channels = FULL_VAE if args.full else SMALL_VAE
        with torch.device(self.factory_kwargs["device"]):
            self.text_encoder = T5EncoderModel(
                T5Config(d_model=self.width, num_layers=24, feed_forward_proj="gated-gelu", **sizes)
            )
            self.vae = AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                block_out_channels=channels,
                layers_per_block=2,
                latent_channels=16,
                norm_num_groups=channels[0] // 4,
                shift_factor=0.1159,
                scaling_factor=0.3611,
            )
        self.text_encoder.to(**self.factory_kwargs).requires_grad_(False).eval()
        self.vae.to(**self.factory_kwargs).requires_grad_(False).eval()
        self.image = self.random(1, 3, 8 * self.latent_size, 8 * self.latent_size)
        self.tokens = torch.randint(1, 32000, (2, TEXT_TOKENS), device=self.factory_kwargs["device"])

    def encoding_step(self) -> None:
        with torch.no_grad():
            self.prompts = [self.text_encoder(one[None]).last_hidden_state for one in self.tokens]
            latent = self.vae.encode(self.image).latent_dist.sample()
            self.source = (latent - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        self.step()

    def step(self) -> None:
        prompt, shortened = self.prompts
        sigma = torch.rand(1, device=self.factory_kwargs["device"])
        noised = ((1 - sigma) * self.source + sigma * torch.randn_like(self.source)).to(self.factory_kwargs["dtype"])
        with torch.no_grad():
            self.transformer.disable_adapters()
            target = self.velocity(noised, sigma, shortened)
            self.transformer.enable_adapters()
        predicted = self.velocity(noised, sigma, prompt)
        torch.nn.functional.mse_loss(predicted.float(), target.float()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def velocity(self, noised: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The predicted velocity as tokens of 2 x 2 latent pixels."""
        tokens = _packed(noised)
        predicted = self.transformer(
            hidden_states=torch.cat([tokens, _packed(self.source)], dim=1),
            encoder_hidden_states=text,
            pooled_projections=self.pooled,
            timestep=sigma.to(**self.factory_kwargs),
            guidance=torch.full((1,), GUIDANCE, device=self.factory_kwargs["device"]),
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return predicted[:, : tokens.shape[1]]


def _transformer(config: Mapping[str, int], dtype: torch.dtype) -> FluxTransformer2DModel:
    """diffusers' model with the benchmark's random weights."""
    depths = {"depth": config["depth"], "depth_single_blocks": config["depth_single_blocks"]}
    sources = flux_to_diffusers({**depths, "hidden_size": config["hidden"]})
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=config["depth"],
            num_single_layers=config["depth_single_blocks"],
            num_attention_heads=config["hidden"] // 128,
            joint_attention_dim=config["context_in_dim"],
            guidance_embeds=True,
        )
    weights = random_weights(config, dtype)
    model.load_state_dict({name: _source_tensor(weights, sources[name]) for name in model.state_dict()}, assign=True)
    return model.requires_grad_(False)


def _source_tensor(weights: Mapping[str, torch.Tensor], source: Any) -> torch.Tensor:
    """A tensor of diffusers by its entry in ComfyUI's map: a name, (name, slice), or (name, None, function)."""
    name, features, *function = (source, None) if isinstance(source, str) else source
    tensor = weights[name.replace("_norm.weight", "_norm.scale")]
    if features is not None:
        tensor = tensor.narrow(*features)
    return function[0](tensor) if function else tensor


def _packed(latent: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


def _ids(side: int, first: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.full_like(rows, first), rows, columns], dim=-1).reshape(-1, 3).float()


class _RandomCache(SampleCache):
    """A cache filled with random latents and text embeddings of `width` instead of encoded ones."""

    def __init__(self, width: int, *args: Any):
        super().__init__(*args)
        self.width = width

    def fill_latents(self, images: Iterable[ImageFile], on_progress: Progress) -> dict[ImageFile, str]:
        for image in dict.fromkeys(images):
            save_file(
                {"latent": torch.randn(1, 16, self.resolution // 8, self.resolution // 8)}, self._latent_file(image)
            )
        return {}

    def fill_texts(self, prompts: Iterable[Prompt], on_progress: Progress) -> None:
        for prompt in dict.fromkeys(prompts):
            tokens = {f"rows.{k}": torch.arange(8 * k, 8 * k + 8, dtype=torch.int32) for k in range(len(prompt))}
            states = torch.randn(1, self.config.max_sequence_length, self.width, dtype=self.dtype)
            save_file(
                {"states": states, "pooled": torch.randn(1, 768, dtype=self.dtype), **tokens}, self._text_file(prompt)
            )


def _run(args: argparse.Namespace, folder: Path) -> Run:
    """A run of the trainer on the benchmark's model."""
    size, latent = model_size(args)
    encoder, vae, image = (folder / name for name in ("encoder", "vae", "image.png"))
    encoder.write_bytes(b"random")
    vae.write_bytes(b"random")
    Image.new("RGB", (8 * latent, 8 * latent)).save(image)
    config = TrainingConfig.model_validate(
        {
            "method": "stlora",
            "name": "benchmark",
            "output": folder,
            "model": {
                "diffusion_model": str(encoder),
                "text_encoders": [str(encoder)],
                "vae": str(vae),
                "max_sequence_length": TEXT_TOKENS,
            },
            "data": {"type": "combinations", "images": folder, "instructions": INSTRUCTIONS, "num_validation": 0},
            "adapter": {"rank": RANK},
            "objective": {"type": "pps", "guidance": GUIDANCE},
            "optimizer": {"learning_rate": 5e-5},
            "run": {"steps": 1000, "batch_size": 1, "resolution": 8 * latent},
        }
    )
    model = FrozenModel(random_model(size, getattr(torch, args.dtypes[0])))
    encoder_name = model.family.context_encoder
    cache = _RandomCache(
        size["context_in_dim"], config.cache_folder, config.model, config.run.resolution, model.dtype, encoder_name
    )
    run = Run(config, Accelerator(cpu=model.device.type == "cpu"), model, cache)
    run.encode_examples(_ignore_progress)
    run.load_model()
    return run


def _ignore_progress(what: str, done: int, total: int) -> None:
    pass


def _velocity_error(plain: _Plain, run: Run) -> float:
    """Relative difference of the two models' predictions for the same inputs before training."""
    noised, sigma = torch.randn_like(plain.source), torch.tensor([0.6], device=plain.factory_kwargs["device"])
    text = Text(plain.prompts[0], plain.pooled)
    with torch.no_grad():
        one = plain.velocity(noised, sigma, text.states).float()
        other = _packed(run.model.velocity(noised, sigma, text, GUIDANCE, [plain.source]))
    return ((one - other).norm() / other.norm()).item()


if __name__ == "__main__":
    main()
