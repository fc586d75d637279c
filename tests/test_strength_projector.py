"""Strength projectors: files, velocities of a model with a projector, and graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.model
import comfy.ops
import comfy.sd
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.comfy_server import PromptRejected
from support.graphs import Graph, Link
from support.model_calls import compiled, noise, velocity_of
from support.outcomes import differ, latents, near

from slider_core import keys
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.strength_projector import (
    ProjectorBundle,
    apply_projector,
    read_projector,
    set_projector_strength,
)
from slider_core.errors import SliderError

SIGMA = 0.7
PROMPT = "make the cat older"


X = noise(1, 16, 8, 8, seed=9)


def text(num_tokens: int = 24, seed: int = 1, **options) -> list:
    pooled = noise(1, 768, seed=seed + 1)
    return [[noise(1, num_tokens, 64, seed=seed), {"pooled_output": pooled, "guidance": 3.5, **options}]]


@pytest.fixture(scope="module")
def weights(recipe, manifest) -> dict[str, torch.Tensor]:
    return recipe.projector_weights(manifest["model"], manifest["adapters"]["projector"])


@pytest.fixture(scope="module")
def lora(recipe, manifest) -> dict[str, torch.Tensor]:
    return recipe.lora_weights(manifest["model"], manifest["adapters"]["kk_lora"])


@pytest.fixture(scope="module")
def bundle(weights, lora, tmp_path_factory) -> ProjectorBundle:
    folder = tmp_path_factory.mktemp("bundle")
    torch.save(weights, folder / "slider_projector.pth")
    save_file(lora, folder / "lora.safetensors")
    return read_projector(folder / "slider_projector.pth", folder / "lora.safetensors")


# --- files


def offsets(bundle: ProjectorBundle) -> torch.Tensor:
    return bundle.projector.offsets((0.0, 0.4, 1.0), noise(1, 768))


def test_projector_and_lora_in_one_file_or_two(weights, lora, bundle, tmp_path):
    save_file(weights | lora, tmp_path / "both.safetensors")
    save_file({f"module.{key}": value for key, value in weights.items()}, tmp_path / "wrapped.safetensors")
    both = read_projector(tmp_path / "both.safetensors")
    projector_only = read_projector(tmp_path / "wrapped.safetensors")
    assert near(offsets(both), offsets(bundle))
    assert near(offsets(projector_only), offsets(bundle))
    assert set(both.lora.lora_weights) == set(bundle.lora.lora_weights)
    assert projector_only.lora is None
    assert "WARNING: no LoRA. Edits will be wrong" in projector_only.describe()
    assert "hidden size 256" in projector_only.describe()
    assert "strength and pooled text (768), 4 layers" in both.describe()


def test_a_projector_without_pooled_text_input(weights, tmp_path):
    strength_only = weights | {"projector.0.weight": weights["projector.0.weight"][:, :768].contiguous()}
    save_file(strength_only, tmp_path / "strength_only.safetensors")
    strength_only = read_projector(tmp_path / "strength_only.safetensors")
    assert strength_only.projector.pooled_width == 0
    [[_, options]] = set_projector_strength([[noise(1, 4, 64), {}]], strength_only, (0.0, 1.0))
    assert options["model_conds"][keys.PROJECTOR_OFFSETS].cond.shape == (2, 512)


def without(*keys: str) -> Callable[[dict], dict]:
    return lambda weights: {k: v for k, v in weights.items() if k not in keys}


def with_shape(key: str, *shape: int) -> Callable[[dict], dict]:
    return lambda weights: weights | {key: torch.zeros(shape)}


INVALID_WEIGHTS = {
    "no extender": (without("pe_extender.weight", "pe_extender.bias"), "weight or the bias of pe_extender is missing"),
    "no bias": (without("projector.4.bias"), "bias of projector.4 is missing"),
    "missing layer": (without("projector.2.weight", "projector.2.bias"), "is incomplete"),
    "one angle": (with_shape("pe_extender.weight", 768, 1), "not a strength projector"),
    "widths that do not match": (with_shape("projector.2.weight", 512, 100), r"\(512, 100\)"),
    "odd output width": (
        lambda w: w | {"projector.6.weight": torch.zeros(511, 512), "projector.6.bias": torch.zeros(511)},
        "not a strength projector",
    ),
    "a LoRA": (
        lambda w: {"transformer.proj_out.lora_A.weight": torch.zeros(4, 4)},
        "does not contain a projector.*as the LoRA",
    ),
    "not finite": (lambda w: w | {"pe_extender.bias": torch.full((768,), torch.nan)}, "pe_extender.bias.*finite"),
    "integers": (
        lambda w: w | {"projector.2.bias": torch.ones(512).int()},
        r"projector\.2\.bias \(torch\.int32\)",
    ),
    "no output features": (with_shape("projector.6.weight", 0, 512), "not a strength projector"),
    "duplicate key": (lambda w: w | {"ema.projector.2.bias": torch.zeros(512)}, "twice"),
    "many digits": (lambda w: {f"projector.{'1' * 5000}.weight": torch.zeros(1)}, "does not contain a projector"),
    "unknown key": (lambda w: w | {"gate.weight": torch.zeros(1)}, "gate.weight"),
}


@pytest.mark.parametrize("case", INVALID_WEIGHTS)
def test_invalid_files(weights, tmp_path, case):
    change, message = INVALID_WEIGHTS[case]
    save_file(change(weights), tmp_path / "invalid.safetensors")
    with pytest.raises(SliderError, match=message):
        read_projector(tmp_path / "invalid.safetensors")


def test_unreadable_files(weights, lora, tmp_path):
    (tmp_path / "empty.pth").touch()
    save_file(weights, tmp_path / "projector.safetensors")
    with pytest.raises(SliderError, match=r"empty\.pth cannot be read as a strength projector"):
        read_projector(tmp_path / "empty.pth")
    with pytest.raises(SliderError, match=r"empty\.pth cannot be read as the LoRA"):
        read_projector(tmp_path / "projector.safetensors", tmp_path / "empty.pth")
    save_file(weights | lora, tmp_path / "both.safetensors")
    assert read_projector(tmp_path / "projector.safetensors", tmp_path / "both.safetensors").lora.lora_weights
    with pytest.raises(SliderError, match="is a projector; expected its LoRA"):
        read_projector(tmp_path / "projector.safetensors", tmp_path / "projector.safetensors")


# --- on a model


def test_other_conds_are_unchanged(golden_model, bundle):
    model = apply_projector(golden_model, bundle)
    bare = velocity_of(golden_model, X, SIGMA, text(), text(seed=5))
    assert torch.equal(bare, velocity_of(model, X, SIGMA, text(), text(seed=5)))
    slid = velocity_of(model, X, SIGMA, set_projector_strength(text(), bundle, 0.6), text(seed=5))
    assert differ(slid[:1], bare[:1])
    assert near(slid[1:], velocity_of(golden_model, X, SIGMA, text(seed=5)))
    assert differ(slid[1:], velocity_of(model, X, SIGMA, set_projector_strength(text(seed=5), bundle, 0.6)))
    assert torch.equal(bare, velocity_of(golden_model, X, SIGMA, text(), text(seed=5)))


def test_strengths_per_image_equal_single_runs(golden_model, bundle):
    model, values = apply_projector(golden_model, bundle), (0.0, 0.35, 1.0)
    together = velocity_of(model, X.repeat(3, 1, 1, 1), SIGMA, set_projector_strength(text(), bundle, values))
    for k, value in enumerate(values):
        one = velocity_of(model, X, SIGMA, set_projector_strength(text(), bundle, value))
        assert near(together[k : k + 1], one)
    assert differ(together[0], together[2])
    with pytest.raises(SliderError, match="3 strengths for a batch of 2"):
        velocity_of(model, X.repeat(2, 1, 1, 1), SIGMA, set_projector_strength(text(), bundle, values))


def test_several_prompts_in_one_cond(golden_model, bundle):
    """ComfyUI repeats the prompts of one cond along the batch; the offsets must be repeated likewise."""
    first, second = text(seed=1)[0], text(seed=5)[0]
    pooled = torch.cat([first[1]["pooled_output"], second[1]["pooled_output"]])
    both = [[torch.cat([first[0], second[0]]), {**first[1], "pooled_output": pooled}]]
    model = apply_projector(golden_model, bundle)
    for strengths in (0.4, (0.2, 0.4, 0.6, 0.8)):
        out = velocity_of(model, X.repeat(4, 1, 1, 1), SIGMA, set_projector_strength(both, bundle, strengths))
        for k in range(4):
            strength = strengths if isinstance(strengths, float) else strengths[k]
            one = set_projector_strength([(first, second)[k % 2]], bundle, strength)
            assert near(out[k : k + 1], velocity_of(model, X, SIGMA, one))


def test_each_cond_has_its_own_pooled_vector_and_strength(golden_model, bundle):
    model = apply_projector(golden_model, bundle)
    conds = [set_projector_strength(text(seed=seed), bundle, s) for seed, s in ((1, 0.2), (5, 0.9))]
    both = velocity_of(model, X, SIGMA, *conds)
    for k, cond in enumerate(conds):
        assert near(both[k : k + 1], velocity_of(model, X, SIGMA, cond))


def test_with_a_gstlora(golden_model, bundle):
    """A projector and its LoRA as a GSTLoRA at strength 0, in either order, equal the projector with its LoRA twice."""
    doubled = replace(
        bundle.lora, lora_weights={m: [f._replace(scale=2.0) for f in fs] for m, fs in bundle.lora.lora_weights.items()}
    )
    slid = set_projector_strength(text(), bundle, 0.6)
    first = apply_gstlora(apply_projector(golden_model, bundle), bundle.lora, 0.0)
    second = apply_projector(apply_gstlora(golden_model, bundle.lora, 0.0), bundle)
    expected = velocity_of(apply_projector(golden_model, replace(bundle, lora=doubled)), X, SIGMA, slid)
    assert near(velocity_of(first, X, SIGMA, slid), expected)
    assert near(velocity_of(second, X, SIGMA, slid), expected)


def test_with_a_controlnet(golden_model, bundle):
    """The effects of a ControlNet and of the projector are both present."""
    params = golden_model.model.diffusion_model.params
    torch.manual_seed(0)
    network = comfy.ldm.flux.controlnet.ControlNetFlux(
        latent_input=True,
        num_union_modes=0,
        dtype=torch.float32,
        operations=comfy.ops.manual_cast,
        **{**vars(params), "depth": 1, "depth_single_blocks": 0},
    )
    network.requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    control = comfy.controlnet.ControlNet(
        network, compression_ratio=1, load_device=torch.device("cpu"), extra_conds=["y", "guidance"]
    )
    hinted = text(control=control.set_cond_hint(noise(1, 16, 8, 8, seed=4)), control_apply_to_uncond=True)
    model = apply_projector(golden_model, replace(bundle, lora=None))
    plain = velocity_of(golden_model, X, SIGMA, text())
    controlled = velocity_of(golden_model, X, SIGMA, hinted)
    assert differ(controlled, plain)
    assert torch.equal(controlled, velocity_of(model, X, SIGMA, hinted))
    both = velocity_of(model, X, SIGMA, set_projector_strength(hinted, bundle, 0.6))
    assert differ(both, controlled)
    assert differ(both, velocity_of(model, X, SIGMA, set_projector_strength(text(), bundle, 0.6)))


@pytest.mark.parametrize("order", ["compiled first", "compiled last"])
def test_torch_compile(golden_model, bundle, order):
    torch._dynamo.reset()
    compiled_model = compiled(golden_model)
    for strength in (0.2, 0.8):
        slid = set_projector_strength(text(), bundle, strength)
        expected = velocity_of(apply_projector(golden_model, bundle), X, SIGMA, slid)
        if order == "compiled last":
            model = compiled(apply_projector(golden_model, bundle))
        else:
            model = apply_projector(compiled_model, bundle)
        assert near(velocity_of(model, X, SIGMA, slid), expected)


def test_mismatched_models_and_conditionings(golden_model, bundle, recipe, manifest, tmp_path):
    wide = recipe.projector_weights(manifest["model"], {"seed": 1, "out_dim": 1024, "n_layers": 2})
    save_file(wide, tmp_path / "wide.safetensors")
    wide = read_projector(tmp_path / "wide.safetensors")
    with pytest.raises(SliderError, match=r"hidden size 512, but this FLUX\.1 model has 256"):
        apply_projector(golden_model, wide)
    with pytest.raises(SliderError, match="projector for hidden size 512, but the model has 256"):
        velocity_of(apply_projector(golden_model, bundle), X, SIGMA, set_projector_strength(text(), wide, 0.5))
    with pytest.raises(SliderError, match="already has a strength projector"):
        apply_projector(apply_projector(golden_model, bundle), bundle)
    for pooled, description in (
        ({}, "none"),
        ({"pooled_output": noise(1, 1280)}, r"one of shape \(1, 1280\)"),
        ({"pooled_output": noise(768)}, r"one of shape \(768,\)"),
        ({"pooled_output": noise(0, 768)}, r"one of shape \(0, 768\)"),
    ):
        with pytest.raises(SliderError, match=f"768 values, but the conditioning has {description}"):
            set_projector_strength([[noise(1, 4, 64), pooled]], bundle, 0.5)


def test_flux2_is_refused(bundle):
    flux2 = comfy.ldm.flux.model.Flux(
        in_channels=128,
        out_channels=128,
        vec_in_dim=None,
        context_in_dim=64,
        hidden_size=256,
        mlp_ratio=3.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[32, 32, 32, 32],
        theta=2000,
        patch_size=1,
        qkv_bias=False,
        guidance_embed=True,
        txt_ids_dims=[3],
        global_modulation=True,
        mlp_silu_act=True,
        ops_bias=False,
        dtype=torch.float32,
        operations=comfy.ops.manual_cast,
    )
    model = comfy.sd.load_diffusion_model_state_dict(flux2.state_dict())
    assert type(model.model).__name__ == "Flux2"
    with pytest.raises(SliderError, match=r"do not support this model \(Flux2 in ComfyUI\); expected FLUX\.1"):
        apply_projector(model, bundle)


# --- graphs


def slid(
    strength, model=lambda g: g.projected(g.model()), mode: str = "clamp to 0..1", **more
) -> Callable[[Graph], Link]:
    return lambda g: g.sample(model(g), g.edited(g.at(g.stock_text(PROMPT), strength, mode)), **more)


def bare(g: Graph) -> Link:
    return g.sample(g.model(), g.edited(g.stock_text(PROMPT)))


def shown_text(server, strength, mode: str) -> str:
    graph = Graph()
    graph.save(slid(strength, mode=mode)(graph))
    result = server.run(graph)
    assert result.ok, result.error
    (node,) = (key for key, value in graph.items() if value["class_type"] == "EditSlidersProjectorStrength")
    return result.text(node)


def test_branches_and_repeated_and_interrupted_runs(server):
    branches = [slid(0.2), bare, slid(0.9), lambda g: g.sample(g.projected(g.model()), g.edited(g.stock_text(PROMPT)))]
    first = latents(server, *branches)
    assert differ(first[0], first[1])
    assert differ(first[0], first[2])
    assert np.array_equal(first[1], first[3])
    graph = Graph()
    graph.save(slid(0.2, steps=2000)(graph))
    prompt = server.submit(graph)
    time.sleep(2)
    server.interrupt()
    assert server.wait(prompt).interrupted
    server.free()
    for branch, expected in zip(branches, first):
        assert np.array_equal(latents(server, branch)[0], expected)


def test_a_moved_slider_reruns_no_upstream_node(server):
    graphs = [Graph(), Graph()]
    for graph, value in zip(graphs, (0.41, 0.42)):
        graph.save(slid(value)(graph))
    assert server.run(graphs[0]).ok
    executed = {graphs[1][node]["class_type"] for node in server.run(graphs[1]).executed}
    assert "KSampler" in executed
    assert not executed & {"UNETLoader", "EditSlidersLoadProjector", "EditSlidersApplyProjector", "CLIPTextEncode"}


def test_cfg_with_a_negative_prompt(server):
    """One Euler step is linear in the guidance scale, so the three runs must lie on a line."""

    def build(cfg: float, positive: Callable, negative: Callable, model: Callable) -> Callable[[Graph], Link]:
        return lambda g: g.sample(model(g), positive(g), negative(g), cfg=cfg, steps=1)

    def moved(g: Graph) -> Link:
        return g.edited(g.at(g.stock_text(PROMPT), 0.7))

    def plain(g: Graph) -> Link:
        return g.edited(g.stock_text("blurry"))

    cond, uncond, guided = latents(
        server,
        build(1.0, moved, moved, lambda g: g.projected(g.model())),
        build(1.0, plain, plain, lambda g: g.model()),
        build(3.0, moved, plain, lambda g: g.projected(g.model())),
    )
    assert near(guided, uncond + 3.0 * (cond - uncond))


def test_a_sweep_equals_single_runs(server):
    def sweep(g: Graph) -> Link:
        strengths = g.add("EditSlidersStrengthList", values="0, 0.6; 1")
        latent = g.add("EditSlidersLatentForSweep", latent=g.noise(), strengths=strengths)
        return g.sample(g.projected(g.model()), g.edited(g.at(g.stock_text(PROMPT), strengths)), latent=latent)

    (swept,) = latents(server, sweep)
    assert swept.shape[0] == 3
    for k, one in enumerate(latents(server, slid(0.0), slid(0.6), slid(1.0))):
        assert near(swept[k : k + 1], one)
    assert differ(swept[0], swept[2])


def test_order_of_apply_nodes_and_loras(server):
    orders = [
        lambda g: g.projected(g.gstlora(g.stlora(g.lora(g.model())), 0.4)),
        lambda g: g.lora(g.stlora(g.gstlora(g.projected(g.model()), 0.4))),
        lambda g: g.gstlora(g.projected(g.stlora(g.lora(g.model()))), 0.4),
    ]

    def build(order: Callable) -> Callable[[Graph], Link]:
        return lambda g: g.sample(order(g), g.edited(g.at(g.strengths(g.instructions(PROMPT), 0.3), 0.6)))

    outs = latents(server, *map(build, orders))
    assert near(outs[0], outs[1])
    assert near(outs[0], outs[2])
    assert differ(outs[0], latents(server, build(lambda g: g.gstlora(g.stlora(g.lora(g.model())), 0.4)))[0])


def test_the_lora_acts_at_the_strength_its_file_declares(server):
    """lora_alpha 8 at rank 4 in the file is a LoRA strength of 2; without a strength only the LoRA acts."""

    def merged(g: Graph) -> Link:
        return g.sample(g.lora(g.model(), "projector_lora.safetensors", 2.0), g.edited(g.stock_text(PROMPT)))

    def bundled(g: Graph) -> Link:
        files = {"name": "projector_bundle.safetensors", "lora": "none, or in the projector's file"}
        text = g.at(g.stock_text(PROMPT), 0.6, **files)
        return g.sample(g.projected(g.model(), **files), g.edited(text))

    dropped, stock, one_file, two_files = latents(
        server, slid(0.5, mode="drop the strength"), merged, bundled, slid(0.6)
    )
    assert near(dropped, stock)
    assert near(one_file, two_files)


def test_strengths_outside_0_to_1_are_clamped_with_a_warning_or_used(server):
    full, clamped, free = latents(server, slid(1.0), slid(1.4), slid(1.4, mode="allow outside 0..1"))
    assert np.array_equal(full, clamped)
    assert differ(full, free)
    assert shown_text(server, 1.4, "clamp to 0..1") == "WARNING: 1.4 outside 0..1, clamped.\nstrength 1"
    assert shown_text(server, 1.4, "allow outside 0..1") == "strength 1.4"
    assert shown_text(server, 0.4, "clamp to 0..1") == "strength 0.4"
    assert "LoRA acts alone" in shown_text(server, 0.4, "drop the strength")


def test_fp8_weights_and_stock_compile(server):
    def compiled(g: Graph) -> Link:
        return g.projected(g.add("TorchCompileModel", model=g.model(), backend="inductor"))

    default, fp8, inductor = latents(
        server, slid(0.3), slid(0.3, model=lambda g: g.projected(g.model("fp8_e4m3fn"))), slid(0.3, model=compiled)
    )
    assert np.allclose(default, inductor, atol=5e-3)
    without, fp8_without = latents(
        server, bare, lambda g: g.sample(g.model("fp8_e4m3fn"), g.edited(g.stock_text(PROMPT)))
    )
    effect, fp8_effect = default - without, fp8 - fp8_without
    cosine = (effect * fp8_effect).sum() / np.linalg.norm(effect) / np.linalg.norm(fp8_effect)
    assert float(cosine) > 0.9


INVALID_FILES = {
    "hostile": ("hostile.pt", None, "LoadProjector", "contains only tensors"),
    "an adapter": ("gst_peft.safetensors", None, "LoadProjector", "does not contain a projector"),
    "no adapter": ("slider_projector.pth", "slider_projector.pth", "LoadProjector", "expected its LoRA"),
    "wide": ("wide_projector.pth", None, "ApplyProjector", "hidden size 256, but this FLUX.1 model has 128"),
    "wide LoRA": ("slider_projector.pth", "wrong_width.safetensors", "ApplyProjector", "does not fit the model"),
}


@pytest.mark.parametrize("case", INVALID_FILES)
def test_invalid_files_in_graphs(server, case):
    name, lora, node, message = INVALID_FILES[case]
    graph = Graph()
    files = {"name": name, "lora": lora or "none, or in the projector's file"}
    graph.save(graph.sample(graph.projected(graph.model(), **files), graph.edited(graph.stock_text(PROMPT))))
    result = server.run(graph)
    assert result.error["node_type"] == f"EditSliders{node}"
    assert message in result.error["exception_message"]
    assert not (server.base / "models" / "PWNED").exists()


@pytest.mark.parametrize("strength", [math.nan, math.inf, 1e300, "half"])
def test_invalid_strengths(server, strength):
    graph = Graph()
    graph.save(slid(strength)(graph))
    with pytest.raises(PromptRejected, match=r"strength is .*; expected a number"):
        server.run(graph)
