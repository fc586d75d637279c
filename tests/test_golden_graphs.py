"""Stable Flow's golden cases through the pack's nodes, on a real server."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from support.graphs import Graph, Link

CASES = {case["id"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]}
SHIFT, SCALE = 0.1159, 0.3611  # of FLUX's latents
MODEL = "golden.safetensors"


@pytest.fixture(scope="module")
def data(server, recipe, manifest) -> dict[str, np.ndarray]:
    """The golden tensors; also saves the golden model in the folder of diffusion models."""
    save_file(recipe.flux_weights(manifest["model"]), server.base / "models" / "diffusion_models" / MODEL)
    files = (GOLDEN / "stableflow.safetensors", GOLDEN / "stableflow_general.safetensors")
    return {key: tensor.numpy() for file in files for key, tensor in load_file(file).items()}


def model(g: Graph) -> Link:
    return g.add("UNETLoader", unet_name=MODEL, weight_dtype="default")


def text(g: Graph, case: dict) -> Link:
    txt, y = (case["inputs"][name]["key"] for name in ("txt", "y"))
    return g.add("TinyTestGoldenText", clip=g.clip(), text=txt, pooled=y)


def manual_sigmas(g: Graph, sigmas: list[float]) -> Link:
    return g.add("ManualSigmas", sigmas=", ".join(map(repr, sigmas)))


def injected(g: Graph, case: dict, **more) -> Link:
    layers = [*case["double_blocks"], *(3 + k for k in case["single_blocks"])]
    inputs = {"reference": 0, "preservation": 1.0, "start": 0.0, "end": 1.0, "chain": False, **more}
    return g.add(
        "EditSlidersInjectVitalLayers",
        model=model(g),
        layers="listed below",
        list=", ".join(map(str, layers)),
        **inputs,
    )


def sampled(g: Graph, case: dict, noise: str, sigmas: list[float], **more) -> Link:
    """Source and edits in one batch, sampled by Euler with these sigmas."""
    guidance = case["guidance"]
    prompts = g.add(
        "EditSlidersStackPrompts",
        clip=text(g, case),
        source="0",
        edits="1\n2",
        source_guidance=guidance[0],
        edit_guidance=guidance[1],
    )
    empty = g.add("EmptySD3LatentImage", width=64, height=96, batch_size=1)
    return g.add(
        "SamplerCustomAdvanced",
        noise=g.add("TinyTestGoldenNoise", key=noise, sigma=sigmas[0]),
        guider=g.add("BasicGuider", model=injected(g, case, **more), conditioning=prompts),
        sampler=g.add("KSamplerSelect", sampler_name="euler"),
        sigmas=manual_sigmas(g, sigmas),
        latent_image=g.add("EditSlidersSameNoise", latent=empty, images=[prompts[0], 1]),
    )


def trajectory(g: Graph, **more) -> Link:
    case = CASES["E4"]
    inputs = {"prompt": "0", "nudging": case["nudging"], "refinements": 0, **more}
    return g.add(
        "EditSlidersInvertPhotograph",
        model=model(g),
        clip=text(g, case),
        latent=g.add("TinyTestGoldenLatent", key=case["inputs"]["clean"]["key"]),
        sigmas=manual_sigmas(g, case["sigmas"]),
        **inputs,
    )


def latent(server, build) -> np.ndarray:
    """The latent of a graph in the scale of the model's input."""
    graph = Graph()
    node = graph.save(build(graph))
    result = server.run(graph)
    assert result.ok, result.error
    return (result.latent(node) - SHIFT) * SCALE


def close(case: dict, out: np.ndarray, expected: np.ndarray) -> bool:
    return np.allclose(out, expected, **case["suggested"])


@pytest.mark.parametrize("name", ["E1", "E1_double_only", "E1_single_only", "E1g"])
def test_injection(server, data, name):
    """The velocity follows from one Euler step to sigma 0, which returns x - sigma * velocity."""
    case = CASES[name]
    [sigma, *_], x = case["sigma"], case["inputs"]["x"]["key"]

    def velocity(**more) -> np.ndarray:
        return (data[x] - latent(server, lambda g: sampled(g, case, x, [sigma, 0.0], **more))) / sigma

    expected = data[case["outputs"]["out"]]
    assert close(case, velocity(), expected)
    assert not close(case, velocity(reference=1), expected)
    assert not close(case, velocity(preservation=0.9), expected)


@pytest.mark.parametrize("name", ["E3", "E3g"])
def test_sampling(server, data, name):
    case = CASES[name]
    noise, expected = case["inputs"]["noise"]["key"], data[case["outputs"]["final"]]
    assert close(case, latent(server, lambda g: sampled(g, case, noise, case["sigmas"])), expected)
    assert not close(
        case, latent(server, lambda g: sampled(g, case, noise, case["sigmas"], preservation=0.0)), expected
    )


def test_inversion(server, data):
    """The latents that Save Trajectory writes."""
    case, graph = CASES["E4"], Graph()
    saves = [
        graph.add("EditSlidersSaveTrajectory", trajectory=trajectory(graph, **more), filename_prefix=f"golden/{k}")
        for k, more in enumerate(({}, {"nudging": 1.0}, {"refinements": 1}))
    ]
    assert server.run(graph).ok
    outs = [
        load_file(server.base / "output" / "golden" / f"{k}_00001_.trajectory.safetensors") for k in range(len(saves))
    ]
    expected = data[case["outputs"]["inverted"]].reshape(-1, 16, 12, 8)
    inverted = [out["latents"].numpy()[:-1][::-1] for out in outs]
    assert [close(case, latents, expected) for latents in inverted] == [True, False, False]


@pytest.mark.parametrize(
    ("name", "source", "other"),
    [
        ("E5", "as in the published code", "follows the trajectory"),
        ("E5_aligned", "follows the trajectory", "as in the published code"),
    ],
)
def test_edit_from_a_trajectory(server, data, name, source, other):
    case = CASES[name]

    def edited(mode: str) -> np.ndarray:
        return latent(
            server,
            lambda g: g.add(
                "EditSlidersEditFromTrajectory",
                model=injected(g, case),
                clip=text(g, case),
                trajectory=trajectory(g),
                edits="1\n2",
                edit_guidance=case["guidance"][1],
                source=mode,
            ),
        )

    expected = data[case["outputs"]["final"]]
    assert close(case, edited(source), expected)
    assert not close(case, edited(other), expected)
