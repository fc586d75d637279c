"""Stable Flow's nodes in graphs over the HTTP API of a real ComfyUI."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from support.graphs import Graph, Link
from support.outcomes import differ, latents, near

SOURCE, EDITS = "a cat", ("a red cat", "a dog on a sofa")
LAYERS = {"layers": "listed below", "list": "0-3"}
TRAJECTORY, PUBLISHED = "follows the trajectory", "as in the published code"
CACHED = "remembered by the model"
NUDGING = 1.15
SHIFT, SCALE = 0.1159, 0.3611  # of FLUX's latents


def photo(g: Graph) -> Link:
    return g.photo()


def sigmas(g: Graph, model: Link, steps: int = 3) -> Link:
    return g.add("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)


def inverted(g: Graph, model=lambda g: g.model(), steps: int = 3, latent=photo, **more) -> Link:
    inputs = {"prompt": SOURCE, "nudging": NUDGING, "refinements": 0, **more}
    return g.add(
        "EditSlidersInvertPhotograph",
        model=model(g),
        clip=g.clip(),
        latent=latent(g),
        sigmas=sigmas(g, g.model(), steps),
        **inputs,
    )


def injected(g: Graph, model: Link, preservation: float = 1.0, **more) -> Link:
    inputs = {**LAYERS, "reference": 0, "start": 0.0, "end": 1.0, "chain": False, **more}
    return g.add("EditSlidersInjectVitalLayers", model=model, preservation=preservation, **inputs)


def edited(
    g: Graph, trajectory: Link, model: Link | None = None, source: str = TRAJECTORY, edits: str = "\n".join(EDITS)
) -> Link:
    return g.add(
        "EditSlidersEditFromTrajectory",
        model=model or injected(g, g.model()),
        clip=g.clip(),
        trajectory=trajectory,
        edits=edits,
        edit_guidance=3.0,
        source=source,
    )


def keep_cached(g: Graph, model: Link, cache: Link, preservation: float = 1.0) -> Link:
    return g.add(
        "EditSlidersInjectRememberedSource",
        model=model,
        remembered=cache,
        preservation=preservation,
        start=0.0,
        end=1.0,
    )


def cached_trajectory(g: Graph, trajectory: Link, limit: float = 0.0) -> Link:
    return g.add("EditSlidersRememberTrajectory", model=g.model(), trajectory=trajectory, memory_limit=limit, **LAYERS)


def cached_source(g: Graph, model: Link, limit: float = 0.0, **more) -> Link:
    inputs = {"seed": 7, "steps": 2, "sampler_name": "euler", "scheduler": "simple", **LAYERS, **more}
    text = g.add("FluxGuidance", conditioning=g.stock_text(SOURCE), guidance=1.0)
    return g.add(
        "EditSlidersRememberSource",
        model=model,
        conditioning=text,
        latent=g.noise(),
        memory_limit=limit,
        **inputs,
    )


def one_edit(g: Graph, model: Link, **more) -> Link:
    text = g.add("FluxGuidance", conditioning=g.stock_text(EDITS[0]), guidance=3.0)
    return g.sample(model, text, **more)


def batched(g: Graph, model: Link, preservation: float = 1.0, **more) -> Link:
    prompts = g.add(
        "EditSlidersStackPrompts",
        clip=g.clip(),
        source=SOURCE,
        edits="\n".join(EDITS),
        source_guidance=1.0,
        edit_guidance=3.0,
    )
    latent = g.add("EditSlidersSameNoise", latent=g.noise(), images=[prompts[0], 1])
    return g.sample(injected(g, model, preservation, **more), prompts, latent=latent)


def bare(g: Graph) -> Link:
    return g.sample(g.model(), g.edited(g.stock_text(SOURCE)))


def test_edits_of_an_inverted_photograph(server):
    """The first image is the nudged photograph; the source acts on its edits."""
    kept, free, encoded, published = latents(
        server,
        lambda g: edited(g, inverted(g)),
        lambda g: edited(g, inverted(g), model=injected(g, g.model(), 0.0)),
        photo,
        lambda g: edited(g, inverted(g), source=PUBLISHED),
    )
    assert kept.shape[0] == 3
    assert near(kept[:1], (NUDGING * SCALE * (encoded - SHIFT)) / SCALE + SHIFT)
    assert differ(kept[1:], free[1:])
    assert differ(kept[1:], published[1:])
    assert differ(kept[1], kept[2])


@pytest.mark.parametrize("limit", [0.0, 1e-9], ids=["in RAM", "recomputed"])
def test_edits_of_a_cached_trajectory(server, limit):
    def alone(g: Graph) -> Link:
        trajectory = inverted(g)
        model = keep_cached(g, g.model(), cached_trajectory(g, trajectory, limit))
        return edited(g, trajectory, model, CACHED)

    together, cached = latents(server, lambda g: edited(g, inverted(g)), alone)
    assert cached.shape[0] == 2
    assert near(cached, together[1:])


@pytest.mark.parametrize("limit", [0.0, 1e-9], ids=["in RAM", "recomputed"])
@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn"])
def test_edits_of_a_cached_source(server, limit, dtype):
    def alone(g: Graph) -> Link:
        return one_edit(g, keep_cached(g, g.model(dtype), cached_source(g, g.model(dtype), limit)))

    def source(g: Graph) -> Link:
        node, _ = cached_source(g, g.model(dtype), limit)
        return [node, 1]

    together, cached, source_latent, without = latents(
        server, lambda g: batched(g, g.model(dtype)), alone, source, lambda g: one_edit(g, g.model(dtype))
    )
    assert near(source_latent, together[:1])
    assert near(cached, together[1:2])
    assert differ(cached, without)


def test_a_new_edit_repeats_neither_inversion_nor_source(server):
    def from_photograph(g: Graph, prompt: str) -> Link:
        return edited(g, inverted(g), edits=prompt)

    def from_noise(g: Graph, prompt: str) -> Link:
        model = keep_cached(g, g.model(), cached_source(g, g.model()))
        return g.sample(model, g.add("FluxGuidance", conditioning=g.stock_text(prompt), guidance=3.0))

    for build in (from_photograph, from_noise):
        graphs = []
        for prompt in ("a blue cat", "a green cat"):
            graph = Graph()
            graph.save(build(graph, prompt))
            graphs.append(graph)
        assert server.run(graphs[0]).ok
        executed = {graphs[1][node]["class_type"] for node in server.run(graphs[1]).executed}
        assert executed & {"KSampler", "EditSlidersEditFromTrajectory"}
        assert not executed & {"EditSlidersInvertPhotograph", "EditSlidersRememberSource", "UNETLoader"}


def test_chained_edits(server):
    chained, plain = latents(
        server, lambda g: batched(g, g.model(), chain=True), lambda g: batched(g, g.model(), chain=False)
    )
    assert near(chained[:2], plain[:2])
    assert differ(chained[2], plain[2])


def test_cached_source_with_other_sliders_and_loras(server):
    """A cached source equals the source in the batch, also with a LoRA and a GSTLoRA on the model."""

    def model(g: Graph) -> Link:
        return g.gstlora(g.lora(g.model()), 0.4)

    def alone(g: Graph) -> Link:
        return one_edit(g, keep_cached(g, model(g), cached_source(g, model(g))))

    together, cached, without = latents(server, lambda g: batched(g, model(g)), alone, lambda g: batched(g, g.model()))
    assert near(cached, together[1:2])
    assert differ(together, without)


def test_stock_torch_compile(server):
    def model(g: Graph) -> Link:
        return g.add("TorchCompileModel", model=g.model(), backend="inductor")

    def alone(g: Graph, model) -> Link:
        return one_edit(g, keep_cached(g, model(g), cached_source(g, model(g))))

    outs = latents(server, lambda g: alone(g, model), lambda g: alone(g, lambda g: g.model()))
    assert np.allclose(outs[0], outs[1], atol=5e-3)


def test_other_runs_and_branches_are_unaffected(server):
    """Neither by another branch of the graph, nor by an earlier run, nor by an interrupted one."""

    def cached_photograph_edit(g: Graph) -> Link:
        trajectory = inverted(g)
        return edited(g, trajectory, keep_cached(g, g.model(), cached_trajectory(g, trajectory)), CACHED)

    [before] = latents(server, bare)
    first, other_branch = latents(server, cached_photograph_edit, bare)
    server.free()
    second, batched_run = latents(server, cached_photograph_edit, lambda g: batched(g, g.model()))
    assert np.array_equal(other_branch, before)
    assert np.array_equal(second, first)

    for build in (lambda g: edited(g, inverted(g, steps=900)), lambda g: edited(g, inverted(g), model=g.model())):
        graph = Graph()
        graph.save(build(graph))
        if any(node["inputs"].get("steps") == 900 for node in graph.values()):
            prompt = server.submit(graph)
            time.sleep(2)
            server.interrupt()
            assert server.wait(prompt).interrupted
        else:
            assert server.run(graph).ok
    server.free()
    after, batched_after = latents(server, bare, lambda g: batched(g, g.model()))
    assert np.array_equal(after, before)
    assert np.array_equal(batched_after, batched_run)


def test_save_and_load_a_trajectory(server):
    graph = Graph()
    trajectory = inverted(graph, prompt="a saved cat")
    save = graph.add("EditSlidersSaveTrajectory", trajectory=trajectory, filename_prefix="kept/photo")
    saved = graph.save(edited(graph, trajectory))
    result = server.run(graph)
    assert result.ok, result.error
    assert "photo_00001_.trajectory.safetensors" in result.text(save[0])
    name = "kept/photo_00001_.trajectory.safetensors [output]"
    options = server.object_info()["EditSlidersLoadTrajectory"]["input"]["required"]["file"]
    assert name in json.dumps(options)

    graph = Graph()
    loaded = graph.add("EditSlidersLoadTrajectory", file=name)
    rendered = graph.save(edited(graph, loaded))
    second = server.run(graph)
    assert second.ok, second.error
    assert "a saved cat" in second.text(loaded[0])
    assert np.array_equal(second.latent(rendered), result.latent(saved))


def test_find_vital_layers(server):
    graph = Graph()
    vital = graph.add(
        "EditSlidersFindVitalLayers",
        model=graph.model(),
        clip=graph.clip(),
        latent=graph.noise(),
        prompts=f"{SOURCE}\n{EDITS[0]}",
        seed=1,
        seeds=1,
        steps=1,
        guidance=3.5,
        choose="the most vital",
        count=2,
        threshold=0.1,
        filename_prefix="vital_layers/tiny",
    )
    listed = graph.add("PreviewAny", source=[vital[0], 0])
    scores = graph.add("PreviewAny", source=[vital[0], 1])
    plot = graph.add("PreviewImage", images=[vital[0], 2])
    used = graph.save(batched(graph, graph.model(), list=[vital[0], 0]))
    result = server.run(graph)
    assert result.ok, result.error
    layers = result.text(listed[0])
    vitality = json.loads(result.text(scores[0]))["vitality"]
    assert [int(k) for k in layers.split(", ")] == sorted(
        sorted(map(int, vitality), key=lambda k: -vitality[str(k)])[:2]
    )
    [image] = result.images(plot[0])
    assert image.size == (1100, 500)
    [typed] = latents(server, lambda g: batched(g, g.model(), list=layers))
    assert np.array_equal(result.latent(used), typed)
    assert len(list((server.base / "output" / "vital_layers").glob("tiny_*.json"))) == 1


def test_find_vital_layers_with_a_reference_latent(server):
    graph = Graph()
    photo, steps = graph.photo(), 2
    vital = graph.add(
        "EditSlidersFindVitalLayers",
        model=graph.model(),
        clip=graph.clip(),
        latent=graph.noise(),
        prompts=EDITS[0],
        seed=1,
        seeds=1,
        steps=steps,
        guidance=3.5,
        choose="the most vital",
        count=1,
        threshold=0.1,
        filename_prefix="vital_layers/edits",
        reference=photo,
    )
    scores = graph.add("PreviewAny", source=[vital[0], 1])
    edit = graph.add("ReferenceLatent", conditioning=graph.stock_text(EDITS[0]), latent=photo)
    guided = graph.add("FluxGuidance", conditioning=edit, guidance=3.5)
    stock = graph.save(graph.sample(graph.model(), guided, seed=1, steps=steps))
    result = server.run(graph)
    assert result.ok, result.error
    [sample] = json.loads(result.text(scores[0]))["samples"].values()
    expected = result.latent(stock).ravel()
    assert near(np.array(sample), expected[torch.linspace(0, expected.size - 1, len(sample)).long()])


def test_latents_are_handled_as_in_the_stock_sampler(server):
    """An empty latent of four channels, and a latent whose batch_index is not 0."""

    def source(g: Graph, latent: Link) -> Link:
        node = cached_source(g, g.model())[0]
        g[node]["inputs"]["latent"] = latent
        return [node, 1]

    def stock(g: Graph, latent: Link) -> Link:
        text = g.add("FluxGuidance", conditioning=g.stock_text(SOURCE), guidance=1.0)
        return g.sample(g.model(), text, latent=latent)

    def four_channels(g: Graph) -> Link:
        return g.add("EmptyLatentImage", width=64, height=64, batch_size=1)

    def third_of_three(g: Graph) -> Link:
        return g.add("LatentFromBatch", samples=g.noise(3), batch_index=2, length=1)

    for latent in (four_channels, third_of_three):
        cached, stock_latent = latents(
            server, lambda g, latent=latent: source(g, latent(g)), lambda g, latent=latent: stock(g, latent(g))
        )
        assert near(cached, stock_latent)


def test_scores_are_saved_in_the_output_folder(server):
    before = set(server.base.iterdir())
    for prefix in ("", ".", "a/.."):
        graph = Graph()
        vital = graph.add(
            "EditSlidersFindVitalLayers",
            model=graph.model(),
            clip=graph.clip(),
            latent=graph.noise(),
            prompts=SOURCE,
            seed=len(prefix),
            seeds=1,
            steps=1,
            guidance=3.5,
            choose="the most vital",
            count=1,
            threshold=0.1,
            filename_prefix=prefix,
        )
        graph.add("PreviewAny", source=[vital[0], 0])
        assert server.run(graph).ok
    assert set(server.base.iterdir()) == before
    assert len(list((server.base / "output").glob("*.json"))) == 3


def test_attention_map(server):
    graph = Graph()
    prompts = graph.add(
        "EditSlidersStackPrompts",
        clip=graph.clip(),
        source=SOURCE,
        edits=EDITS[0],
        source_guidance=1.0,
        edit_guidance=3.0,
    )
    attention_map = graph.add(
        "EditSlidersViewAttention",
        model=injected(graph, graph.model()),
        conditioning=prompts,
        latent=graph.add("EditSlidersSameNoise", latent=graph.noise(), images=[prompts[0], 1]),
        vae=graph.add("VAELoader", vae_name="taef1"),
        seed=1,
        steps=1,
        picture=1,
        across=0.25,
        down=0.75,
        **LAYERS,
    )
    preview = graph.add("PreviewImage", images=[attention_map[0], 0])
    samples = graph.save([attention_map[0], 1])
    result = server.run(graph)
    assert result.ok, result.error
    assert result.images(preview[0])[0].size == (1200, 800)
    assert result.latent(samples).shape[0] == 2


def invalid(name: str, build, node: str, message: str):
    return pytest.param(build, node, message, id=name)


@pytest.mark.parametrize(
    ("build", "node", "message"),
    [
        invalid(
            "batch of one",
            lambda g: one_edit(g, injected(g, g.model())),
            "KSampler",
            "The batch has one image; expected source and edits in one batch",
        ),
        invalid(
            "source_index out of range",
            lambda g: batched(g, g.model(), reference=5),
            "KSampler",
            "source_index is 5, but the batch has 3 images",
        ),
        invalid(
            "sampler that adds noise",
            lambda g: g.sample(injected(g, g.model()), g.stock_text(SOURCE), sampler_name="euler_ancestral"),
            "KSampler",
            "The sampler 'euler_ancestral' adds new noise at every step",
        ),
        invalid(
            "other schedule",
            lambda g: one_edit(g, keep_cached(g, g.model(), cached_source(g, g.model())), steps=3),
            "KSampler",
            "Sample the edits with the source's schedule (2 steps, scheduler simple)",
        ),
        invalid(
            "other size",
            lambda g: one_edit(
                g,
                keep_cached(g, g.model(), cached_source(g, g.model())),
                latent=g.add("EmptySD3LatentImage", width=96, height=64, batch_size=1),
            ),
            "KSampler",
            "expected the same size",
        ),
        invalid(
            "layer out of range",
            lambda g: one_edit(g, keep_cached(g, g.model(), cached_source(g, g.model(), list="1, 9"))),
            "EditSlidersRememberSource",
            "The model has no layer 9; expected layers from 0 to 3",
        ),
        invalid(
            "no cached source",
            lambda g: edited(g, inverted(g), g.model(), CACHED),
            "EditSlidersEditFromTrajectory",
            "The model has no cached source",
        ),
        invalid(
            "cache of another trajectory",
            lambda g: edited(
                g,
                inverted(g),
                keep_cached(g, g.model(), cached_trajectory(g, inverted(g, nudging=1.1))),
                CACHED,
            ),
            "EditSlidersEditFromTrajectory",
            "The model's cached source is not this trajectory",
        ),
        invalid(
            "empty edits",
            lambda g: edited(g, inverted(g), edits=" \n "),
            "EditSlidersEditFromTrajectory",
            "There is no prompt",
        ),
        invalid(
            "edit longer than the padded source",
            lambda g: edited(g, inverted(g), edits="very " * 600 + "red cat"),
            "EditSlidersEditFromTrajectory",
            "an edit prompt is longer than 512 tokens",
        ),
        invalid(
            "empty latent",
            lambda g: edited(g, inverted(g, latent=lambda g: g.noise())),
            "EditSlidersInvertPhotograph",
            "expected an image with 16 channels, from 'VAE Encode'",
        ),
        invalid(
            "batch of photographs",
            lambda g: edited(g, inverted(g, latent=lambda g: g.add("RepeatLatentBatch", samples=g.photo(), amount=2))),
            "EditSlidersInvertPhotograph",
            "The latent has 2 images; expected one to invert",
        ),
        invalid(
            "injection in the inversion",
            lambda g: edited(g, inverted(g, model=lambda g: injected(g, g.model()))),
            "EditSlidersInvertPhotograph",
            "The batch has one image",
        ),
        invalid(
            "not flow matching",
            lambda g: edited(
                g,
                inverted(
                    g,
                    model=lambda g: g.add("ModelSamplingDiscrete", model=g.model(), sampling="eps", zsnr=False),
                ),
            ),
            "EditSlidersInvertPhotograph",
            "which is not flow matching",
        ),
        invalid(
            "incomplete schedule",
            lambda g: g.add(
                "EditSlidersEditFromTrajectory",
                model=injected(g, g.model()),
                clip=g.clip(),
                trajectory=g.add(
                    "EditSlidersInvertPhotograph",
                    model=g.model(),
                    clip=g.clip(),
                    latent=g.photo(),
                    sigmas=g.add("SplitSigmas", sigmas=sigmas(g, g.model()), step=2),
                    prompt=SOURCE,
                    nudging=NUDGING,
                    refinements=0,
                ),
                edits="a dog",
                edit_guidance=3.0,
                source=TRAJECTORY,
            ),
            "EditSlidersInvertPhotograph",
            "expected at least two that fall from at most 1 to 0",
        ),
    ],
)
def test_invalid_graphs(server, build, node, message):
    graph = Graph()
    graph.save(build(graph))
    result = server.run(graph)
    assert not result.ok
    assert result.error["node_type"] == node
    assert message in result.error["exception_message"]


def test_invalid_trajectory_files(server):
    folder = server.base / "output" / "broken"
    folder.mkdir(parents=True)
    lora = server.base / "models" / "loras" / "gst_peft.safetensors"
    (folder / "lora.trajectory.safetensors").write_bytes(lora.read_bytes())
    (folder / "truncated.trajectory.safetensors").write_bytes(lora.read_bytes()[:2000])
    for name, message in (("lora", "is not a trajectory"), ("truncated", "cannot be read as a trajectory")):
        graph = Graph()
        loaded = graph.add("EditSlidersLoadTrajectory", file=f"broken/{name}.trajectory.safetensors [output]")
        graph.save(edited(graph, loaded))
        result = server.run(graph)
        assert result.error["node_type"] == "EditSlidersLoadTrajectory"
        assert message in result.error["exception_message"]
