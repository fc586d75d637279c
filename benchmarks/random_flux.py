"""Shared by the benchmarks: ComfyUI on sys.path, random models in FLUX.1's layout, command line options."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [os.environ["COMFYUI_PATH"], str(ROOT / "tests")]
sys.path.append(str(ROOT))

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = not torch.cuda.is_available()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
from support.tiny_models import recipe  # noqa: E402

COMMON = {"latent_channels": 16, "vec_in_dim": 768, "seed": 1}
SMALL = COMMON | {"hidden": 1024, "depth": 4, "depth_single_blocks": 8, "context_in_dim": 512}
FULL = COMMON | {"hidden": 3072, "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096}
TEXT_TOKENS = 512
Model = Any


def options(description: str | None) -> argparse.Namespace:
    """The command line options: full, steps, repeats, dtypes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="FLUX.1's own size, 1024x1024; needs about 30 GB on a GPU")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float8_e4m3fn"] if torch.cuda.is_available() else ["float32"]
    )
    return parser.parse_args()


def models(args: argparse.Namespace) -> Iterator[tuple[Model, int]]:
    """One model per dtype, one at a time, with the height and width of its latent. Prints machine and models."""
    config, latent = model_size(args)
    print_machine()
    for dtype in args.dtypes:
        model = random_model(config, getattr(torch, dtype))
        print_model(model, dtype, latent)
        with torch.inference_mode():
            yield model, latent
        del model
        gc.collect()
        comfy.model_management.unload_all_models()


def model_size(args: argparse.Namespace) -> tuple[Mapping[str, int], int]:
    """The model's config, and the height and width of its latent."""
    return (FULL, 128) if args.full else (SMALL, 32)


def print_machine() -> None:
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"machine: {torch.cuda.get_device_name() if torch.cuda.is_available() else cores}; torch {torch.__version__}")


def print_model(model: Model, dtype: str, latent: int) -> None:
    size = sum(p.numel() for p in model.model.diffusion_model.parameters()) / 1e6
    print(f"\nmodel: FLUX.1 layout, {size:.0f} million random parameters, {dtype}; {latent * 8}x{latent * 8}")


def text(model: Model, **options: Any) -> list:
    """A conditioning of random text tokens, (1, TEXT_TOKENS, context width), for the model."""
    width = model.model.model_config.unet_config["context_in_dim"]
    return [[torch.randn(1, TEXT_TOKENS, width), {"pooled_output": torch.randn(1, 768), "guidance": 2.5, **options}]]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Peak memory in bytes within the context: allocated on the GPU, else resident in this process (every 2 ms)."""
    peak = [0.0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = float(torch.cuda.max_memory_allocated())
        return
    gc.collect()
    done, process = threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def random_weights(config: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same random weights in every run, on the device, with ComfyUI's names."""
    device = comfy.model_management.get_torch_device()
    generator = torch.Generator(device).manual_seed(1)
    weights = {}
    for name, shape in recipe.flux_shapes(config).items():
        values = torch.randn(
            shape, generator=generator, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
        )
        weights[name] = (values * 0.02 + (1.0 if name.endswith(".scale") else 0.0)).to(dtype)
    return weights


def random_model(config: Mapping[str, int], dtype: torch.dtype) -> Model:
    return comfy.sd.load_diffusion_model_state_dict(random_weights(config, dtype), model_options={"dtype": dtype})
