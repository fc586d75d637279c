"""Golden cases A to E: outputs of the papers' code, reproduced by the pack's patches on ComfyUI's model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from comfy.conds import CONDRegular
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from support.model_calls import velocity_of

from slider_core.adapters import strength_projector
from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.adapters.strength_projector import (
    ProjectorBundle,
    StrengthProjector,
    apply_projector,
    drop_projector_strength,
    read_projector,
    set_projector_strength,
)
from slider_core.conditioning.span_strengths import Span, attach_spans, set_strengths
from slider_core.patching.forward_patches import add_patch, patches_of
from slider_core.stable_flow.inversion import InverseEuler, SourceMode, edit_from_trajectory, invert
from slider_core.stable_flow.vital_layers import bypass_blocks, inject_key_values

STLORA = GOLDEN / "examples" / "selective_lora.pt"
GSTLORA = GOLDEN / "examples" / "gstlora_pytorch_lora_weights.safetensors"
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]


def cases(kind: str) -> list:
    return [pytest.param(case, id=case["id"]) for case in CASES if case["kind"] == kind]


@pytest.fixture(scope="session")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "forward_cases.safetensors")


@pytest.fixture
def velocity(golden_model, stored):
    """Runs a case through ComfyUI's own conditioning code, element by element; returns the velocities of the batch."""

    def run(case: dict, model=None, cond=lambda c, element: c) -> torch.Tensor:
        model = model or golden_model
        inputs = {name: stored[spec["key"]] for name, spec in case["inputs"].items()}
        velocities = []
        for k in range(inputs["x"].shape[0]):
            element = {name: tensor[k : k + 1] for name, tensor in inputs.items()}
            options = {"pooled_output": element["y"], "guidance": case["guidance"][k]}
            if "ref0" in element:
                raw = model.model.latent_format.process_out(element["ref0"])
                options |= {"reference_latents": [raw], "reference_latents_method": "offset"}
            conditioning = cond([[element["txt"], options]], k)
            velocities.append(velocity_of(model, element["x"], case["sigma"][k], conditioning))
        return torch.cat(velocities)

    return run


def close(case: dict, stored: dict, out: torch.Tensor) -> bool:
    return torch.allclose(out, stored[case["outputs"]["out"]], **case["suggested"])


def with_spans(case: dict, alpha=lambda a: a, order=lambda spans: spans):
    """A function (conditioning, element) that adds spans and strengths of the case's batch element."""

    def cond(conditioning: list, element: int) -> list:
        spans = order(case["spans"])[element]
        text = [Span(str(k), tuple(span["token_indices"])) for k, span in enumerate(spans)]
        strengths = {str(k): 1.0 - alpha(span["alpha"]) for k, span in enumerate(spans)}
        return set_strengths(attach_spans(conditioning, case["text_length"], text), strengths)

    return cond


@pytest.mark.parametrize("case", cases("base_forward"))
def test_base(case, velocity, stored):
    assert close(case, stored, velocity(case))


@pytest.mark.parametrize("case", cases("stlora_forward"))
def test_stlora(case, velocity, stored, golden_model):
    round_alpha = (lambda a: torch.tensor(a).bfloat16().item()) if case["scale_dtype"] == "bfloat16" else (lambda a: a)
    model = apply_stlora(golden_model, read_adapter(STLORA))
    assert close(case, stored, velocity(case, model, with_spans(case, round_alpha)))


@pytest.mark.parametrize("case", cases("gstlora_forward"))
def test_gstlora(case, velocity, stored, golden_model):
    model = apply_gstlora(golden_model, read_adapter(GSTLORA), 1.0 - case["alpha"])
    assert close(case, stored, velocity(case, model))


STLORA_VARIANTS = {
    "negated_alpha": partial(with_spans, alpha=lambda a: -a),
    "alpha_ignored": partial(with_spans, alpha=lambda a: 1.0),
    "rows_swapped": partial(with_spans, order=lambda spans: spans[::-1]),
}


@pytest.mark.parametrize("case", cases("stlora_forward"))
def test_wrong_stloras_differ(case, velocity, stored, golden_model):
    model = apply_stlora(golden_model, read_adapter(STLORA))
    variants = {"lora_also_on_unspanned_tokens_at_scale_1": with_spans(case | {"spans": _spans_on_all_tokens(case)})}
    variants |= {name: variant(case) for name, variant in STLORA_VARIANTS.items()}
    for name in case["discrimination_max_abs"]:
        out = velocity(case, model, variants[name])
        assert not close(case, stored, out), name
        negated_twice = name == "negated_alpha" and case["id"] == "B5"
        if case["scale_dtype"] == "float32" and not negated_twice:
            distance = (out - stored[case["outputs"]["out"]]).abs().max().item()
            assert distance == pytest.approx(case["discrimination_max_abs"][name], abs=1e-3), name


def _spans_on_all_tokens(case: dict) -> list:
    out = []
    for spans in case["spans"]:
        spanned = {t for span in spans for t in span["token_indices"]}
        unspanned = [t for t in range(case["text_length"]) if t not in spanned]
        out.append([*spans, {"token_indices": unspanned, "alpha": 1.0}])
    return out


DROPPED_TARGETS = {
    "single_block_part_dropped": lambda module: module.startswith("single_blocks"),
    "image_stream_part_dropped": lambda module: ".img_" in module,
    "text_stream_part_dropped": lambda module: ".txt_" in module,
}


@pytest.mark.parametrize("case", cases("gstlora_forward"))
def test_wrong_gstloras_differ(case, velocity, stored, golden_model):
    adapter = read_adapter(GSTLORA)
    for name, distance in case["discrimination_max_abs"].items():
        if name == "negated_alpha":
            model = apply_gstlora(golden_model, adapter, 1.0 + case["alpha"])
        else:
            lora_weights = {m: f for m, f in adapter.lora_weights.items() if not DROPPED_TARGETS[name](m)}
            model = apply_gstlora(golden_model, replace(adapter, lora_weights=lora_weights), 1.0 - case["alpha"])
        out = velocity(case, model)
        assert not close(case, stored, out), name
        measured = (out - stored[case["outputs"]["out"]]).abs().max().item()
        assert measured == pytest.approx(distance, abs=1e-3), name


def test_wrong_order_of_q_k_v_differs(velocity, stored, golden_model):
    """LoRA weights of q, k and v applied to the wrong thirds of the fused qkv must not match the golden output."""
    case = next(c for c in CASES if c["id"] == "B1")
    adapter = read_adapter(STLORA)
    rotated = {
        m: [f._replace(offset=(f.offset + 1) % 3) if f.size else f for f in factors]
        for m, factors in adapter.lora_weights.items()
    }
    model = apply_stlora(golden_model, replace(adapter, lora_weights=rotated))
    assert not close(case, stored, velocity(case, model, with_spans(case)))


# --- D: Kontinuous Kontext


@pytest.fixture(scope="session")
def projector(recipe, manifest, tmp_path_factory) -> ProjectorBundle:
    """The golden projector with its LoRA, loaded from files in the authors' format."""
    folder = tmp_path_factory.mktemp("projector")
    torch.save(
        recipe.projector_weights(manifest["model"], manifest["adapters"]["projector"]), folder / "slider_projector.pth"
    )
    save_file(recipe.lora_weights(manifest["model"], manifest["adapters"]["kk_lora"]), folder / "lora.safetensors")
    return read_projector(folder / "slider_projector.pth", folder / "lora.safetensors")


def strengths_of(case: dict) -> list:
    return case["slider"] if isinstance(case["slider"], list) else [case["slider"]]


def with_slider(case: dict, bundle: ProjectorBundle, sliders: list | None = None):
    """A function (conditioning, element) that sets the slider value of the case's batch element."""
    sliders = sliders or strengths_of(case)

    def cond(conditioning: list, element: int) -> list:
        if sliders[element] is None:
            return drop_projector_strength(conditioning, bundle)
        return set_projector_strength(conditioning, bundle, sliders[element])

    return cond


def with_swapped_offsets(case: dict, bundle: ProjectorBundle, pooled: torch.Tensor):
    def cond(conditioning: list, element: int) -> list:
        ((text, options),) = conditioning
        other = [[text, {**options, "pooled_output": pooled[1 - element : 2 - element]}]]
        ((_, other_options),) = set_projector_strength(other, bundle, strengths_of(case)[1 - element])
        return [[text, {**other_options, "pooled_output": options["pooled_output"]}]]

    return cond


def for_case(case: dict, bundle: ProjectorBundle) -> ProjectorBundle:
    return bundle if case["lora"] else replace(bundle, lora=None)


def test_projector_output(projector, stored, manifest):
    (case,) = (c for c in CASES if c["kind"] == "kk_projector")
    out = projector.projector.offsets(tuple(case["slider_values"]), stored[case["inputs"]["y"]["key"]])
    expected = stored[case["outputs"]["out"]].reshape(out.shape)
    assert torch.allclose(out, expected, **case["suggested"])


@pytest.mark.parametrize("case", cases("kk_forward"))
def test_projector_forward(case, velocity, stored, golden_model, projector):
    bundle = for_case(case, projector)
    model = apply_projector(golden_model, bundle)
    assert close(case, stored, velocity(case, model, with_slider(case, bundle)))


def halves_swapped(p: StrengthProjector) -> StrengthProjector:
    *first_layers, (weight, bias) = p.layers
    return replace(p, layers=(*first_layers, (weight.roll(p.hidden_size, 0), bias.roll(p.hidden_size, 0))))


def sign_flipped(p: StrengthProjector) -> StrengthProjector:
    *first_layers, (weight, bias) = p.layers
    return replace(p, layers=(*first_layers, (-weight, -bias)))


def cosine_first(p: StrengthProjector) -> StrengthProjector:
    return replace(p, extender=(p.extender[0].flip(1), p.extender[1]))


def pooled_first(p: StrengthProjector) -> StrengthProjector:
    (weight, bias), *remaining_layers = p.layers
    return replace(p, layers=((weight.roll(p.extender[0].shape[0], 1), bias), *remaining_layers))


PROJECTOR_VARIANTS = {
    "halves_swapped": halves_swapped,
    "scale_shift_halves_swapped": halves_swapped,
    "sign_flipped": sign_flipped,
    "order_cos_sin_instead_of_sin_cos": cosine_first,
    "clip_before_scalar": pooled_first,
}


def test_wrong_projectors_differ(projector, stored):
    (case,) = (c for c in CASES if c["kind"] == "kk_projector")
    pooled = stored[case["inputs"]["y"]["key"]]
    for name, distance in case["discrimination_max_abs"].items():
        out = PROJECTOR_VARIANTS[name](projector.projector).offsets(tuple(case["slider_values"]), pooled)
        measured = (out - stored[case["outputs"]["out"]].reshape(out.shape)).abs().max().item()
        assert measured == pytest.approx(distance, abs=1e-3), name


@pytest.mark.parametrize("case", [c for c in cases("kk_forward") if c.values[0].get("discrimination_max_abs")])
def test_forwards_of_wrong_projectors_differ(case, velocity, stored, golden_model, projector):
    for name, distance in case["discrimination_max_abs"].items():
        bundle, sliders = for_case(case, projector), strengths_of(case)
        if name == "lora_only":
            sliders = [None] * len(sliders)
        elif name == "modulation_only":
            bundle = replace(bundle, lora=None)
        elif name == "s0_for_s":
            sliders = [1.0 if s == 0 else 0.0 for s in sliders]
        elif name != "rows_swapped":
            bundle = replace(bundle, projector=PROJECTOR_VARIANTS[name](bundle.projector))
        cond = with_slider(case, bundle, sliders)
        if name == "rows_swapped":
            cond = with_swapped_offsets(case, bundle, stored[case["inputs"]["y"]["key"]])
        out = velocity(case, apply_projector(golden_model, bundle), cond)
        assert not close(case, stored, out), name
        measured = (out - stored[case["outputs"]["out"]]).abs().max().item()
        assert measured == pytest.approx(distance, abs=1e-3), name


@pytest.mark.parametrize("target", ["attention modulation", "image stream", "one block"])
def test_projector_on_other_modules_differs(target, velocity, stored, golden_model, projector, monkeypatch):
    case = next(c for c in CASES if c["id"] == "D_mod_s1.00")
    bundle = replace(projector, lora=None)
    right = apply_projector(golden_model, bundle)
    paths = list(patches_of(right)[0].paths)
    if target == "attention modulation":
        monkeypatch.setattr(strength_projector, "_add_offsets", offset_of_attention)
    elif target == "image stream":
        paths = [path.replace("txt_mod", "img_mod") for path in paths]
    else:
        paths = paths[:1]
    wrong = add_patch(
        golden_model, strength_projector.ModulationOffset(paths, bundle.projector.hidden_size, None, None)
    )
    assert not close(case, stored, velocity(case, wrong, with_slider(case, bundle)))


def offset_of_attention(scale: torch.Tensor, shift: torch.Tensor):
    def wrap(forward):
        def with_offset(vec):
            attention, mlp = forward(vec)
            return type(mlp)(attention.shift + shift, attention.scale + scale, attention.gate), mlp

        return with_offset

    return wrap


# --- E1, E2: Stable Flow's injection and bypass


@pytest.fixture(scope="session")
def stable_flow() -> dict[str, torch.Tensor]:
    return {
        **load_file(GOLDEN / "stableflow.safetensors"),
        **load_file(GOLDEN / "stableflow_general.safetensors"),
    }


def batch_velocity(case: dict, data: dict[str, torch.Tensor], model) -> torch.Tensor:
    """Velocities of a batch with one prompt per image, from one cond."""
    txt, y, x = (data[case["inputs"][name]["key"]] for name in ("txt", "y", "x"))
    return velocity_of(model, x, case["sigma"][0], [[txt, {"pooled_output": y, "guidance": case["guidance"][0]}]])


def layers_of(model, double: list[int], single: list[int]) -> list[int]:
    depth = len(model.model.diffusion_model.double_blocks)
    return [*double, *(depth + k for k in single)]


@pytest.mark.parametrize("case", cases("stableflow_forward"))
def test_injection(case, stable_flow, golden_model):
    layers = layers_of(golden_model, case["double_blocks"], case["single_blocks"])
    expected = stable_flow[case["outputs"]["out"]]
    out = batch_velocity(case, stable_flow, inject_key_values(golden_model, layers))
    assert torch.allclose(out, expected, **case["suggested"])
    wrong = {
        "single_ignored": layers_of(golden_model, case["double_blocks"], []),
        "double_ignored": layers_of(golden_model, [], case["single_blocks"]),
    }
    for name in wrong.keys() & case["discrimination_max_abs"].keys():
        out = batch_velocity(case, stable_flow, inject_key_values(golden_model, wrong[name]))
        distance = case["discrimination_max_abs"][name]
        assert (out - expected).abs().max().item() == pytest.approx(distance, abs=1e-3), name


def test_wrong_injections_differ(stable_flow, golden_model):
    """A fixed text length of 512 in single blocks and another source image must not match the golden output."""
    case = next(c for c in CASES if c["id"] == "E1g")
    layers = layers_of(golden_model, case["double_blocks"], case["single_blocks"])
    expected = stable_flow[case["outputs"]["out"]]
    fixed = inject_key_values(golden_model, layers)
    [patch] = patches_of(fixed)
    patch.forward_wrappers = lambda context: type(patch).forward_wrappers(patch, replace(context, num_text_tokens=512))
    assert not torch.allclose(batch_velocity(case, stable_flow, fixed), expected, **case["suggested"])
    other = inject_key_values(golden_model, layers, source_index=1)
    assert not torch.allclose(batch_velocity(case, stable_flow, other), expected, **case["suggested"])


def test_bypass(stable_flow, golden_model):
    case = next(c for c in CASES if c["kind"] == "layer_bypass")
    outputs = stable_flow[case["outputs"]["out"]]
    none = stable_flow[case["none_key"]]
    assert torch.allclose(batch_velocity(case, stable_flow, golden_model), none, **case["suggested"])
    for k, expected in enumerate(outputs):
        out = batch_velocity(case, stable_flow, bypass_blocks(golden_model, [k]))
        assert torch.allclose(out, expected.reshape(out.shape), **case["suggested"]), k
    assert not torch.allclose(
        batch_velocity(case, stable_flow, bypass_blocks(golden_model, [0])), outputs[-1].reshape(out.shape)
    )


def test_bypass_of_several_blocks(stable_flow, golden_model):
    case = next(c for c in CASES if c["kind"] == "layer_bypass_multi")
    layers = layers_of(golden_model, case["skip_double"], case["skip_single"])
    out = batch_velocity(case, stable_flow, bypass_blocks(golden_model, layers))
    assert torch.allclose(out, stable_flow[case["outputs"]["out"]], **case["suggested"])


@pytest.mark.parametrize("case", cases("stableflow_sampling"))
def test_sampling_with_injection(case, stable_flow, golden_model):
    """Euler sampling written out, with the same noise for all images and injection at every step."""
    txt, y, noise = (stable_flow[case["inputs"][name]["key"]] for name in ("txt", "y", "noise"))
    text = [[txt, {"pooled_output": y, "guidance": case["guidance"][0]}]]
    layers = layers_of(golden_model, case["double_blocks"], case["single_blocks"])
    model, z, sigmas = inject_key_values(golden_model, layers), noise.repeat(len(txt), 1, 1, 1), case["sigmas"]
    for k, expected in enumerate(stable_flow[case["outputs"]["steps"]]):
        z = z + (sigmas[k + 1] - sigmas[k]) * velocity_of(model, z, sigmas[k], text)
        assert torch.allclose(z, expected, **case["suggested"]), k


# --- E4, E5: inversion, and edits of the inverted image


def text_of(case: dict, data: dict[str, torch.Tensor], num_prompts: int, guidance: list[float]) -> list:
    txt, y = (data[case["inputs"][name]["key"]][:num_prompts] for name in ("txt", "y"))
    per_image = {"guidance": None, "model_conds": {"guidance": CONDRegular(torch.tensor(guidance))}}
    return [[txt, {"pooled_output": y, **per_image}]]


@pytest.fixture(scope="session")
def run_inversion(stable_flow, golden_model):
    case = next(c for c in CASES if c["id"] == "E4")
    sigmas, clean = torch.tensor(case["sigmas"]), stable_flow[case["inputs"]["clean"]["key"]]

    def run(**more):
        latent = golden_model.model.latent_format.process_out(clean)
        text = text_of(case, stable_flow, 1, case["guidance"])
        return invert(golden_model, text, latent, sigmas, "a", **{"nudging": case["nudging"], **more})

    return run


def test_inversion(stable_flow, run_inversion, golden_model):
    case = next(c for c in CASES if c["id"] == "E4")
    expected = stable_flow[case["outputs"]["inverted"]].reshape(-1, 16, 12, 8)
    trajectory = run_inversion()
    assert torch.allclose(trajectory.latents[:-1].flip(0), expected, **case["suggested"])
    nudged = case["nudging"] * stable_flow[case["inputs"]["clean"]["key"]]
    assert torch.allclose(trajectory.latents[-1:], nudged, **case["suggested"])
    assert trajectory.sigmas.tolist() == pytest.approx(case["sigmas"], rel=1e-6)
    not_nudged = run_inversion(nudging=1.0).latents[:-1].flip(0)
    distance = case["discrimination_max_abs"]["no_nudging"]
    assert (not_nudged - expected).abs().max().item() == pytest.approx(distance, abs=1e-3)
    assert not torch.allclose(run_inversion(refinements=1).latents[:-1].flip(0), expected, **case["suggested"])


def test_inversion_with_the_velocity_of_the_start_sigma_differs(stable_flow, run_inversion, monkeypatch):
    """Inversion steps that use the velocity at their first sigma must not match the golden output."""

    def start_sigma_loop(self, denoise, sigmas, latent, on_step):
        x = latent * self.nudging
        self.latents = [x]
        for sigma, following in itertools.pairwise(sigmas):
            start = sigma.clamp(min=1e-3)
            x = x + (following - sigma) * (x - denoise(x, start)) / start
            self.latents.append(x)
        return x

    case = next(c for c in CASES if c["id"] == "E4")
    expected = stable_flow[case["outputs"]["inverted"]].reshape(-1, 16, 12, 8)
    monkeypatch.setattr(InverseEuler, "sample_loop", start_sigma_loop)
    assert not torch.allclose(run_inversion().latents[:-1].flip(0), expected, **case["suggested"])


@pytest.mark.parametrize(
    ("kind", "source"), [("stableflow_edit", SourceMode.PUBLISHED), ("stableflow_edit_aligned", SourceMode.TRAJECTORY)]
)
def test_edit_from_a_trajectory(kind, source, stable_flow, run_inversion, golden_model):
    [case] = [c for c in CASES if c["kind"] == kind]
    layers = layers_of(golden_model, case["double_blocks"], case["single_blocks"])
    model, steps = inject_key_values(golden_model, layers), []
    text = text_of(case, stable_flow, 3, [float(g) for g in case["guidance"]])
    trajectory = run_inversion()
    edit_from_trajectory(model, text, trajectory, source, lambda k, denoised, x, n: steps.append(x.clone()))
    expected_steps = stable_flow[case["outputs"]["steps"]]
    for k, (out, expected) in enumerate(zip(steps, expected_steps, strict=True)):
        assert torch.allclose(out, expected, **case["suggested"]), k
    other = SourceMode.TRAJECTORY if source == SourceMode.PUBLISHED else SourceMode.PUBLISHED
    for wrong in (other, SourceMode.CACHED):
        out = edit_from_trajectory(model, text, trajectory, wrong)
        assert not torch.allclose(
            golden_model.model.latent_format.process_in(out), expected_steps[-1], **case["suggested"]
        )
