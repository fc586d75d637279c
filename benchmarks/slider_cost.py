"""The cost of sliders, as ratios measured in one run on this machine.

    python run.py benchmark [--full] [--steps N] [--repeats N]

(a) time from a moved slider to the first model call: LoRA branches and a strength projector, and Load LoRA with the
same file; (b) time of a sampling step and (c) peak memory with 0, 1 and 4 moved sliders, with a strength projector, and
with each method without an adapter, relative to the bare model; and the number of model evaluations per step.
Random weights: 284 million parameters at 256x256 plus reference by default, FLUX.1's 12 billion at 1024x1024 plus
reference with --full (for GPUs). Medians of interleaved repeats.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from random_flux import FULL, SMALL, TEXT_TOKENS, Model, models, options, peak_memory, recipe, synchronize, text  # isort: skip

import comfy.sample
import comfy.sd
import comfy.utils
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.adapters.strength_projector import apply_projector, read_projector, set_projector_strength
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.sampling.flow_matching import scheduler_sigmas
from slider_core.training_free.attention_reweighting import apply_attention_reweighting
from slider_core.training_free.flowslider import sample_flowslider
from slider_core.training_free.prompt_difference import PromptDifferences
from slider_core.training_free.text_modulation import apply_text_modulation
from slider_core.training_free.token_interpolation import apply_token_interpolation
from slider_core.training_free.velocity_blending import blend_velocity

RANK = 16
_REST = {"2": 1.0, "3": 1.0, "4": 1.0}


class FirstCall(Exception):
    """Raised in place of the first model call."""


def main() -> None:
    args = options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        adapters = _adapters(FULL if args.full else SMALL, Path(folder))
        for model, latent in models(args):
            _report(_Bench(model, adapters, latent, args.steps), args.repeats)


class _Bench:
    def __init__(self, model: Model, adapters: Mapping[str, Path], latent: int, steps: int):
        self.model, self.files, self.steps = model, adapters, steps
        self.st, self.gst = read_adapter(adapters["st"]), read_adapter(adapters["gst"])
        self.projector = read_projector(adapters["projector"], adapters["gst"])
        self.latent = torch.zeros(1, 16, latent, latent)
        self.noise = torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(0))
        self.spans = [Span(str(k), tuple(range(8 * k, 8 * k + 8))) for k in range(4)]
        self.text = attach_spans(
            text(model, reference_latents=[self.noise]), TEXT_TOKENS, self.spans, padding=TEXT_TOKENS - 32
        )

    def with_strengths(self, *strengths: float) -> list:
        return set_strengths(self.text, {str(k): v for k, v in enumerate((*strengths, 1.0, 1.0, 1.0, 1.0)[:4])})

    def gst_stack(self, model: Model, count: int) -> Model:
        for k in range(count):
            model = apply_gstlora(model, self.gst, 0.5 + 0.1 * k)
        return model

    def sample(self, model: Model, text: list, steps: int) -> None:
        comfy.sample.sample(
            model, self.noise, steps, 1.0, "euler", "simple", text, text, self.latent, disable_pbar=True, seed=0
        )

    def flowslider(self, model: Model, steps: int) -> None:
        sigmas = scheduler_sigmas(model, "simple", steps)
        sample_flowslider(model, self.text, self.text, self.noise, self.noise, (0.5,), sigmas, seed=0)

    def variants(self, bare: Model) -> dict[str, Callable[[], Callable[[int], None]]]:
        """Variants by name; each returns a function that samples with `bare` for a given number of steps."""
        st = apply_stlora(bare, self.st)
        projector = apply_projector(bare, self.projector)
        differences = PromptDifferences("", self.spans, self.text, [self.text] * 4)
        variants = {
            "bare": lambda: (bare, self.text),
            "STLoRA, 0 moved": lambda: (st, self.with_strengths()),
            "STLoRA, 1 moved": lambda: (st, self.with_strengths(0.5)),
            "STLoRA, 4 moved": lambda: (st, self.with_strengths(0.5, 0.2, 1.3, 0.0)),
            "GSTLoRA, strength 1": lambda: (apply_gstlora(bare, self.gst, 1.0), self.text),
            "GSTLoRA, 1 moved": lambda: (self.gst_stack(bare, 1), self.text),
            "GSTLoRA, 4 moved": lambda: (self.gst_stack(bare, 4), self.text),
            "strength projector": lambda: (
                apply_projector(bare, replace(self.projector, lora=None)),
                set_projector_strength(self.text, self.projector, 0.5),
            ),
            "strength projector and LoRA": lambda: (projector, set_projector_strength(self.text, self.projector, 0.5)),
            "text modulation": lambda: (apply_text_modulation(bare), self.with_strengths(0.5)),
            "attention to text": lambda: (apply_attention_reweighting(bare), self.with_strengths(0.5)),
            "token interpolation": lambda: (apply_token_interpolation(bare), self.with_strengths(0.5)),
            "Velocity Blending": lambda: (blend_velocity(bare, self.noise, (0.5,)), self.text),
            "Prompt Difference, 1 moved": lambda: (bare, differences.with_strengths({"1": 0.5, **_REST})),
            "Prompt Difference, 2 moved": lambda: (bare, differences.with_strengths({"1": 0.5, **_REST, "2": 0.2})),
        }
        runs = {name: partial(self._sampling, variant) for name, variant in variants.items()}
        return {**runs, "FlowSlider": lambda: partial(self.flowslider, bare)}

    def _sampling(self, variant: Callable[[], tuple[Model, list]]) -> Callable[[int], None]:
        return partial(self.sample, *variant())

    def evaluations(self) -> dict[str, int]:
        """The number of model evaluations per step of each variant, batched or not."""
        calls: list[int] = []
        counted = self.model.clone()
        counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", partial(_counting, calls))
        evaluations = {}
        for name, variant in self.variants(counted).items():
            calls.clear()
            variant()(1)
            evaluations[name] = sum(calls)
        return evaluations

    def to_first_call(self, change: Callable[[float], tuple[Model, list]], strength: float) -> float:
        """Seconds from a moved slider until the model is called."""
        synchronize()
        start = time.perf_counter()
        model, text = change(strength)
        with contextlib.suppress(FirstCall):
            self.sample(model, text, 1)
        synchronize()
        return time.perf_counter() - start


def _report(bench: _Bench, repeats: int) -> None:
    stopped = bench.model.clone()
    stopped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", _stop)
    st = apply_stlora(stopped, bench.st)
    projector = apply_projector(stopped, bench.projector)
    lora = comfy.utils.load_torch_file(str(bench.files["gst"]))
    changes = {
        "Load LoRA (ComfyUI)": lambda s: (
            comfy.sd.load_lora_for_models(stopped, None, lora, 1.0 - s, 0)[0],
            bench.text,
        ),
        "GSTLoRA": lambda s: (apply_gstlora(stopped, bench.gst, s), bench.text),
        "STLoRA": lambda s: (st, bench.with_strengths(s)),
        "strength projector": lambda s: (projector, set_projector_strength(bench.text, bench.projector, s)),
    }
    print(f"\n(a) moved slider to first model call, median of {repeats} repeats")
    seconds: dict[str, list[float]] = {}
    for name, change in changes.items():
        values = [0.1 + 0.8 * k / repeats for k in range(repeats + 1)]
        seconds[name] = [bench.to_first_call(change, s) for s in values][1:]
    load_lora = statistics.median(seconds["Load LoRA (ComfyUI)"])
    for name, durations in seconds.items():
        median = statistics.median(durations)
        print(f"    {name:20} {median * 1e3:10.1f} ms    Load LoRA / this: {load_lora / median:8.1f}")

    print(
        "\n(b) step time and (c) peak memory relative to the bare model, "
        f"{bench.steps} steps, median of {repeats} repeats"
    )
    variants = bench.variants(bench.model)
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        print(f"    round {repeat} of {repeats}", file=sys.stderr)
        for name, variant in variants.items():
            run = variant()
            run(1)
            with peak_memory() as peak:
                synchronize()
                start = time.perf_counter()
                run(bench.steps)
                synchronize()
            if repeat:
                times[name].append((time.perf_counter() - start) / bench.steps)
                peaks[name].append(peak[0])
    evaluations = bench.evaluations()
    for name in variants:
        step = statistics.median(a / b for a, b in zip(times[name], times["bare"]))
        memory = statistics.median(a / b for a, b in zip(peaks[name], peaks["bare"]))
        low, high = (f(a / b for a, b in zip(times[name], times["bare"])) for f in (min, max))
        print(
            f"    {name:28} step x {step:.3f} ({low:.3f} to {high:.3f})    memory x {memory:.3f}    "
            f"evaluations {evaluations[name]}"
        )
    print(
        f"    bare: {statistics.median(times['bare']):.3f} s per step, "
        f"{statistics.median(peaks['bare']) / 2**30:.2f} GiB"
    )


def _counting(calls: list[int], executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    calls.append(x.shape[0])
    return executor(x, *args, **kwargs)


def _stop(executor: Any, *args: Any, **kwargs: Any) -> None:
    raise FirstCall


def _adapters(config: Mapping[str, int], folder: Path) -> dict[str, Path]:
    """Rank 16 adapter files in the authors' layouts, written to `folder`."""
    st = recipe.lora_weights(config, {"which": "stlora", "rank": RANK, "seed": 2, "gain": 0.05, "prefix": ""})
    gst = recipe.lora_weights(
        config, {"which": "full", "rank": RANK, "seed": 3, "gain": 0.05, "prefix": "transformer."}
    )
    projector = recipe.projector_weights(config, {"seed": 4, "out_dim": 2 * config["hidden"], "n_layers": 4})
    files = {
        "st": folder / "selective_lora.pt",
        "gst": folder / "pytorch_lora_weights.safetensors",
        "projector": folder / "slider_projector.pth",
    }
    torch.save({k: v.bfloat16() for k, v in projector.items()}, files["projector"])
    torch.save({k: v.bfloat16() for k, v in st.items()}, files["st"])
    save_file({k: v.bfloat16().contiguous() for k, v in gst.items()}, files["gst"])
    return files


if __name__ == "__main__":
    main()
