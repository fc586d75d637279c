"""The cost of one more edit of a source, as ratios measured in one run on this machine.

    python run.py benchmark [--full] [--steps N] [--repeats N]

An edit with a cached source, kept in RAM or computed again, relative to source and edit rendered in one batch (as in
Stable Flow), and an edit by itself. Random weights as in the other benchmarks; the fraction of injected layers is that
of FLUX.1's vital layers. Medians of interleaved repeats.
"""

from __future__ import annotations

import statistics
import time

import torch

from random_flux import Model, models, options, synchronize, text  # isort: skip

import comfy.sample
import comfy.samplers

from slider_core.sampling.sampling_settings import SamplingSettings
from slider_core.stable_flow.source_kv_cache import cache_source_kv, inject_cached
from slider_core.stable_flow.vital_layers import block_count, inject_key_values

VITAL_FRACTION = 10 / 57


def main() -> None:
    args = options(__doc__)
    for model, latent in models(args):
        _report(model, torch.zeros(1, 16, latent, latent), args.steps, args.repeats)


def _report(model: Model, empty: torch.Tensor, steps: int, repeats: int) -> None:
    count = block_count(model)
    layers = [round(k * count / round(VITAL_FRACTION * count)) for k in range(round(VITAL_FRACTION * count))]
    source, edit = text(model), text(model)
    both = [[torch.cat([source[0][0], edit[0][0]]), {**edit[0][1], "pooled_output": torch.randn(2, 768)}]]
    noise = torch.randn_like(empty)
    kept, recomputed = (
        cache_source_kv(model, source, empty, noise, layers, SamplingSettings(steps, seed=0), limit)[0]
        for limit in (0.0, 1e-9)
    )
    print(f"layers {layers}; cached source: {kept.describe()}")
    variants = {
        "source and edit in one batch": (inject_key_values(model, layers), both, 2),
        "cached source, in RAM": (inject_cached(model, kept), edit, 1),
        "cached source, recomputed": (inject_cached(model, recomputed), edit, 1),
        "edit by itself": (model, edit, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, (patched, conditioning, images) in variants.items():
            latent = empty.repeat(images, 1, 1, 1)
            inputs = (torch.randn_like(empty).repeat(images, 1, 1, 1), steps, 1.0, "euler", "simple")
            synchronize()
            start = time.perf_counter()
            comfy.sample.sample(patched, *inputs, conditioning, conditioning, latent, disable_pbar=True, seed=0)
            synchronize()
            if repeat:
                times[name].append((time.perf_counter() - start) / steps)
    [batch, *_] = times.values()
    print(f"\ntime relative to source and edit in one batch, {steps} steps, median of {repeats} repeats")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, batch)]
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"    {name:28} x {median:.3f} ({low:.3f} to {high:.3f})    {statistics.median(seconds):8.3f} s per step")


if __name__ == "__main__":
    main()
