"""The order of Apply nodes in a graph does not change the result."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, permutations

import comfy.sample
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from conftest import GOLDEN
from support.graphs import Graph, Link
from support.model_calls import noise
from support.outcomes import latents, near

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import GSTLoRAPatch, apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.adapters.strength_projector import (
    ProjectorBundle,
    apply_projector,
    read_projector,
    set_projector_strength,
)
from slider_core.conditioning.active_region import ActiveRegion
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.patching.batch_splitting import split_batches
from slider_core.patching.forward_patches import Phase
from slider_core.sampling.sampling_settings import SamplingSettings
from slider_core.stable_flow.source_kv_cache import cache_source_kv, inject_cached
from slider_core.stable_flow.vital_layers import KVInjection, inject_key_values
from slider_core.training_free.attention_reweighting import apply_attention_reweighting
from slider_core.training_free.text_modulation import TextModulation, apply_text_modulation
from slider_core.training_free.token_interpolation import apply_token_interpolation
from slider_core.training_free.velocity_blending import blend_velocity

Apply = Callable[[ModelPatcher], ModelPatcher]

EXAMPLES = GOLDEN / "examples"
BLOCKS = range(7)
STEPS, TEXT_TOKENS = 2, 24
NOISE = noise(3, 16, 8, 8, seed=9)
LEFT_HALF = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], dim=2)


def text(seed: int) -> list:
    options = {"pooled_output": noise(1, 768, seed=seed + 1), "guidance": 3.5}
    return [[noise(1, TEXT_TOKENS, 64, seed=seed), options]]


@pytest.fixture(scope="module")
def projector(recipe, manifest, tmp_path_factory) -> ProjectorBundle:
    path = tmp_path_factory.mktemp("projector") / "slider_projector.pth"
    torch.save(recipe.projector_weights(manifest["model"], manifest["adapters"]["projector"]), path)
    return read_projector(path, EXAMPLES / "kk_pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def conditioning(projector) -> list:
    """Two instructions and a projector strength, each with a strength of its own for each of the three images."""
    spans = [Span("first", (2, 3, 4)), Span("second", (4, 5, 6, 7))]
    spanned = attach_spans(text(1), TEXT_TOKENS, spans, padding=4)
    strengths = set_strengths(spanned, {"strength_1": (1.0, 0.3, 0.6), "strength_2": (0.5, 1.2, 0.8)})
    return set_projector_strength(strengths, projector, (0.2, 0.9, 0.5))


@pytest.fixture(scope="module")
def apply_nodes(golden_model, projector) -> dict[str, Apply]:
    stlora = read_adapter(EXAMPLES / "selective_lora.pt")
    gstlora = read_adapter(EXAMPLES / "gstlora_pytorch_lora_weights.safetensors")

    def cached_source(seed: int, strength: float) -> Apply:
        latent = torch.zeros(1, 16, 8, 8)
        settings = SamplingSettings(steps=STEPS, sampler="euler", scheduler="simple", seed=seed)
        cache, _ = cache_source_kv(golden_model, text(seed), latent, noise(1, 16, 8, 8, seed=seed), BLOCKS, settings)
        return lambda model: inject_cached(model, cache, strength)

    return {
        "STLoRA": lambda model: apply_stlora(model, stlora),
        "GSTLoRA": lambda model: apply_gstlora(model, gstlora, (1.0, 0.0, 0.5)),
        "projector": lambda model: apply_projector(model, projector),
        "text modulation": apply_text_modulation,
        "token interpolation": apply_token_interpolation,
        "attention reweighting": apply_attention_reweighting,
        "velocity blending": lambda model: blend_velocity(model, noise(1, 16, 8, 8, seed=3), (0.4,)),
        "keep source": lambda model: inject_key_values(model, BLOCKS),
        "keep image 1 partly": lambda model: inject_key_values(model, BLOCKS, 1, 0.4),
        "keep source in the left half": lambda model: inject_key_values(model, BLOCKS, 2, 0.7, ActiveRegion(LEFT_HALF)),
        "keep the image before": lambda model: inject_key_values(model, BLOCKS, strength=0.6, chained=True),
        "keep cached source": cached_source(21, 0.5),
        "keep another cached source": cached_source(22, 0.5),
        "split batch": lambda model: split_batches(model, 2),
    }


def refused(names: tuple[str, str]) -> bool:
    """Pairs that are refused by name: injections within a batch that is split."""
    within_batch = [name for name in names if name.startswith("keep") and "cached" not in name]
    return "split batch" in names and bool(within_batch)


def sampled(model: ModelPatcher, conditioning: list) -> torch.Tensor:
    empty = torch.zeros_like(NOISE)
    return comfy.sample.sample(
        model, NOISE, STEPS, 1.0, "euler", "simple", conditioning, conditioning, empty, disable_pbar=True
    )


def test_all_orders_of_all_pairs_agree(golden_model, apply_nodes, conditioning):
    bare = sampled(golden_model, conditioning)
    alone = {name: sampled(apply(golden_model), conditioning) for name, apply in apply_nodes.items()}
    unchanged = [name for name, result in alone.items() if near(result, bare)]
    assert unchanged == ["split batch"]
    for names in filter(lambda names: not refused(names), combinations(apply_nodes, 2)):
        first, second = (apply_nodes[name] for name in names)
        one = sampled(second(first(golden_model)), conditioning)
        other = sampled(first(second(golden_model)), conditioning)
        assert near(one, other), f"{names}: {(one - other).norm() / one.norm():.2g} apart"
        if "split batch" not in names:
            assert not near(one, bare), names


def test_a_projector_is_not_scaled_by_text_modulation(golden_model, apply_nodes, conditioning, monkeypatch):
    """The two orders differ; the phases choose the one that adds the offsets last."""
    model = apply_nodes["text modulation"](apply_nodes["projector"](golden_model))
    chosen = sampled(model, conditioning)
    monkeypatch.setattr(TextModulation, "phase", Phase.REPLACE)
    scaled = apply_nodes["text modulation"](apply_nodes["projector"](golden_model))
    assert not near(sampled(scaled, conditioning), chosen)


def test_without_phases_the_order_matters(golden_model, apply_nodes, conditioning, monkeypatch):
    monkeypatch.setattr(KVInjection, "phase", GSTLoRAPatch.phase)
    monkeypatch.setattr(KVInjection, "sort_key", ())
    gstlora, keep_source = apply_nodes["GSTLoRA"], apply_nodes["keep source"]
    one = sampled(keep_source(gstlora(golden_model)), conditioning)
    other = sampled(gstlora(keep_source(golden_model)), conditioning)
    assert not near(one, other)


APPLY_NODES: dict[str, Callable[[Graph, Link], Link]] = {
    "Apply Slider Adapter (Per Instruction)": lambda g, model: g.stlora(model),
    "Apply Slider Adapter (Whole Prompt)": lambda g, model: g.gstlora(model, strength_list(g, "1, 0, 0.5")),
    "Apply Strength Projector": lambda g, model: g.projected(model),
    "text modulation": lambda g, model: training_free(g, model, "text modulation"),
    "attention to text": lambda g, model: training_free(g, model, "attention to text"),
    "token interpolation": lambda g, model: training_free(g, model, "token interpolation"),
    "Velocity Blending": lambda g, model: g.add(
        "EditSlidersVelocityBlending", model=model, latent=g.photo(), strength=0.4, keep_below=0.0, start=0.0, end=1.0
    ),
    "Keep Source": lambda g, model: g.add(
        "EditSlidersInjectVitalLayers",
        model=model,
        layers="all layers",
        list="0",
        reference=0,
        preservation=1.0,
        start=0.0,
        end=1.0,
        chain=False,
    ),
}


def strength_list(g: Graph, values: str) -> Link:
    return g.add("EditSlidersStrengthList", values=values)


def training_free(g: Graph, model: Link, method: str) -> Link:
    return g.add("EditSlidersApplyTrainingFree", model=model, method=method)


def test_all_orders_of_all_pairs_of_apply_nodes_agree(server):
    """In graphs with the real nodes. The tiny model's weights are random, so every node changes the latents."""

    def edited(*apply_nodes: str) -> Callable[[Graph], Link]:
        def build(g: Graph) -> Link:
            model = g.model()
            for name in apply_nodes:
                model = APPLY_NODES[name](g, model)
            strengths = strength_list(g, "1, 0.3, 0.6"), strength_list(g, "0.5, 1.2, 0.8")
            instructed = g.strengths(g.instructions("make it red\nadd a hat", pad_to_512=False), *strengths)
            return g.sample(model, g.edited(g.at(instructed, 0.3)), latent=g.noise(3))

        return build

    pairs = list(combinations(APPLY_NODES, 2))
    results = iter(latents(server, edited(), *(edited(*order) for pair in pairs for order in permutations(pair))))
    bare = next(results)
    for pair in pairs:
        one, other = next(results), next(results)
        assert near(one, other), pair
        assert not near(one, bare), pair
