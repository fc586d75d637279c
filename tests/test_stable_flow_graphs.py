"""Stable Flow's nodes as whole graphs over the HTTP API of a real ComfyUI."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from support.graphs import Graph, Link
from support.outcomes import far, latents, near

SOURCE, EDITS = "a cat", ("a red cat", "a dog on a sofa")
LAYERS = {"layers": "listed below", "list": "0-3"}
FOLLOWS, PUBLISHED = "follows the trajectory", "as in the published code"
REMEMBERED = "remembered by the model"
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
    g: Graph, trajectory: Link, model: Link | None = None, source: str = FOLLOWS, edits: str = "\n".join(EDITS)
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


def from_memory(g: Graph, model: Link, remembered: Link, preservation: float = 1.0) -> Link:
    return g.add(
        "EditSlidersInjectRememberedSource",
        model=model,
        remembered=remembered,
        preservation=preservation,
        start=0.0,
        end=1.0,
    )


def remembered_trajectory(g: Graph, trajectory: Link, limit: float = 0.0) -> Link:
    return g.add("EditSlidersRememberTrajectory", model=g.model(), trajectory=trajectory, memory_limit=limit, **LAYERS)


def remembered_source(g: Graph, model: Link, limit: float = 0.0, **more) -> Link:
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


def parallel(g: Graph, model: Link, preservation: float = 1.0, **more) -> Link:
    stack = g.add(
        "EditSlidersStackPrompts",
        clip=g.clip(),
        source=SOURCE,
        edits="\n".join(EDITS),
        source_guidance=1.0,
        edit_guidance=3.0,
    )
    latent = g.add("EditSlidersSameNoise", latent=g.noise(), images=[stack[0], 1])
    return g.sample(injected(g, model, preservation, **more), stack, latent=latent)


def bare(g: Graph) -> Link:
    return g.sample(g.model(), g.edited(g.stock_text(SOURCE)))


def test_a_photograph_and_its_edits(server):
    """The first picture is the photograph, nudged; its edits keep something of it."""
    whole, free, encoded, other = latents(
        server,
        lambda g: edited(g, inverted(g)),
        lambda g: edited(g, inverted(g), model=injected(g, g.model(), 0.0)),
        photo,
        lambda g: edited(g, inverted(g), source=PUBLISHED),
    )
    assert whole.shape[0] == 3
    assert near(whole[:1], (NUDGING * SCALE * (encoded - SHIFT)) / SCALE + SHIFT)
    assert far(whole[1:], free[1:])
    assert far(whole[1:], other[1:])
    assert far(whole[1], whole[2])


@pytest.mark.parametrize("limit", [0.0, 1e-9], ids=["kept", "computed again"])
def test_edits_of_a_remembered_photograph(server, limit):
    def alone(g: Graph) -> Link:
        trajectory = inverted(g)
        model = from_memory(g, g.model(), remembered_trajectory(g, trajectory, limit))
        return edited(g, trajectory, model, REMEMBERED)

    together, apart = latents(server, lambda g: edited(g, inverted(g)), alone)
    assert apart.shape[0] == 2
    assert near(apart, together[1:])


@pytest.mark.parametrize("limit", [0.0, 1e-9], ids=["kept", "computed again"])
@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn"])
def test_edits_of_a_remembered_source(server, limit, dtype):
    def alone(g: Graph) -> Link:
        return one_edit(g, from_memory(g, g.model(dtype), remembered_source(g, g.model(dtype), limit)))

    def source(g: Graph) -> Link:
        node, _ = remembered_source(g, g.model(dtype), limit)
        return [node, 1]

    together, apart, first, without = latents(
        server, lambda g: parallel(g, g.model(dtype)), alone, source, lambda g: one_edit(g, g.model(dtype))
    )
    assert near(first, together[:1])
    assert near(apart, together[1:2])
    assert far(apart, without)


def test_a_new_edit_runs_no_inversion_and_no_source_again(server):
    def photograph(g: Graph, words: str) -> Link:
        return edited(g, inverted(g), edits=words)

    def from_noise(g: Graph, words: str) -> Link:
        model = from_memory(g, g.model(), remembered_source(g, g.model()))
        return g.sample(model, g.add("FluxGuidance", conditioning=g.stock_text(words), guidance=3.0))

    for part in (photograph, from_noise):
        graphs = []
        for words in ("a blue cat", "a green cat"):
            graph = Graph()
            graph.save(part(graph, words))
            graphs.append(graph)
        assert server.run(graphs[0]).ok
        again = {graphs[1][node]["class_type"] for node in server.run(graphs[1]).executed}
        assert again & {"KSampler", "EditSlidersEditFromTrajectory"}
        assert not again & {"EditSlidersInvertPhotograph", "EditSlidersRememberSource", "UNETLoader"}


def test_a_chain_of_edits(server):
    chained, plain = latents(
        server, lambda g: parallel(g, g.model(), chain=True), lambda g: parallel(g, g.model(), chain=False)
    )
    assert near(chained[:2], plain[:2])
    assert far(chained[2], plain[2])


def test_together_with_other_sliders_and_loras(server):
    """A remembered source equals the source in the batch, whatever else is on the model."""

    def model(g: Graph) -> Link:
        return g.gstlora(g.lora(g.model()), 0.4)

    def alone(g: Graph) -> Link:
        return one_edit(g, from_memory(g, model(g), remembered_source(g, model(g))))

    together, apart, without = latents(server, lambda g: parallel(g, model(g)), alone, lambda g: parallel(g, g.model()))
    assert near(apart, together[1:2])
    assert far(together, without)


def test_stock_torch_compile(server):
    def model(g: Graph) -> Link:
        return g.add("TorchCompileModel", model=g.model(), backend="inductor")

    def alone(g: Graph, model) -> Link:
        return one_edit(g, from_memory(g, model(g), remembered_source(g, model(g))))

    outs = latents(server, lambda g: alone(g, model), lambda g: alone(g, lambda g: g.model()))
    assert np.allclose(outs[0], outs[1], atol=5e-3)


def test_nothing_leaks(server):
    """Not into another branch, not into the next run, not out of an interrupted one."""

    def everything(g: Graph) -> Link:
        trajectory = inverted(g)
        return edited(g, trajectory, from_memory(g, g.model(), remembered_trajectory(g, trajectory)), REMEMBERED)

    [before] = latents(server, bare)
    first, beside = latents(server, everything, bare)
    server.free()
    again, parallel_run = latents(server, everything, lambda g: parallel(g, g.model()))
    assert np.array_equal(beside, before)
    assert np.array_equal(again, first)

    for part in (lambda g: edited(g, inverted(g, steps=900)), lambda g: edited(g, inverted(g), model=g.model())):
        graph = Graph()
        graph.save(part(graph))
        if any(node["inputs"].get("steps") == 900 for node in graph.values()):
            prompt = server.submit(graph)
            time.sleep(2)
            server.interrupt()
            assert server.wait(prompt).interrupted
        else:
            assert server.run(graph).ok
    server.free()
    after, after_parallel = latents(server, bare, lambda g: parallel(g, g.model()))
    assert np.array_equal(after, before)
    assert np.array_equal(after_parallel, parallel_run)


def test_a_trajectory_on_disk(server):
    graph = Graph()
    trajectory = inverted(graph, prompt="a saved cat")
    save = graph.add("EditSlidersSaveTrajectory", trajectory=trajectory, filename_prefix="kept/photo")
    kept = graph.save(edited(graph, trajectory))
    result = server.run(graph)
    assert result.ok, result.error
    assert "photo_00001_.trajectory.safetensors" in result.text(save[0])
    name = "kept/photo_00001_.trajectory.safetensors [output]"
    offered = server.object_info()["EditSlidersLoadTrajectory"]["input"]["required"]["file"]
    assert name in json.dumps(offered)

    graph = Graph()
    loaded = graph.add("EditSlidersLoadTrajectory", file=name)
    again = graph.save(edited(graph, loaded))
    second = server.run(graph)
    assert second.ok, second.error
    assert "a saved cat" in second.text(loaded[0])
    assert np.array_equal(second.latent(again), result.latent(kept))


def test_vital_layers_are_found_and_used(server):
    graph = Graph()
    found = graph.add(
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
    words = graph.add("PreviewAny", source=[found[0], 0])
    scores = graph.add("PreviewAny", source=[found[0], 1])
    plot = graph.add("PreviewImage", images=[found[0], 2])
    used = graph.save(parallel(graph, graph.model(), list=[found[0], 0]))
    result = server.run(graph)
    assert result.ok, result.error
    layers = result.text(words[0])
    vitality = json.loads(result.text(scores[0]))["vitality"]
    assert [int(k) for k in layers.split(", ")] == sorted(
        sorted(map(int, vitality), key=lambda k: -vitality[str(k)])[:2]
    )
    [picture] = result.images(plot[0])
    assert picture.size == (1100, 500)
    [typed] = latents(server, lambda g: parallel(g, g.model(), list=layers))
    assert np.array_equal(result.latent(used), typed)
    assert len(list((server.base / "output" / "vital_layers").glob("tiny_*.json"))) == 1


def test_vital_layers_of_edits_are_found_with_the_reference(server):
    graph = Graph()
    photo, steps = graph.photo(), 2
    found = graph.add(
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
    scores = graph.add("PreviewAny", source=[found[0], 1])
    edit = graph.add("ReferenceLatent", conditioning=graph.stock_text(EDITS[0]), latent=photo)
    guided = graph.add("FluxGuidance", conditioning=edit, guidance=3.5)
    stock = graph.save(graph.sample(graph.model(), guided, seed=1, steps=steps))
    result = server.run(graph)
    assert result.ok, result.error
    [seen] = json.loads(result.text(scores[0]))["samples"].values()
    made = result.latent(stock).ravel()
    assert near(np.array(seen), made[torch.linspace(0, made.size - 1, len(seen)).long()])


def test_latents_are_taken_as_by_the_stock_sampler(server):
    """An empty latent of four channels, and a latent with a noise of its own in the batch."""

    def source(g: Graph, latent: Link) -> Link:
        node = remembered_source(g, g.model())[0]
        g[node]["inputs"]["latent"] = latent
        return [node, 1]

    def stock(g: Graph, latent: Link) -> Link:
        text = g.add("FluxGuidance", conditioning=g.stock_text(SOURCE), guidance=1.0)
        return g.sample(g.model(), text, latent=latent)

    def four_channels(g: Graph) -> Link:
        return g.add("EmptyLatentImage", width=64, height=64, batch_size=1)

    def third_of_three(g: Graph) -> Link:
        return g.add("LatentFromBatch", samples=g.noise(3), batch_index=2, length=1)

    for make in (four_channels, third_of_three):
        ours, theirs = latents(server, lambda g, make=make: source(g, make(g)), lambda g, make=make: stock(g, make(g)))
        assert near(ours, theirs)


def test_scores_stay_in_the_output_folder(server):
    before = set(server.base.iterdir())
    for prefix in ("", ".", "a/.."):
        graph = Graph()
        found = graph.add(
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
        graph.add("PreviewAny", source=[found[0], 0])
        assert server.run(graph).ok
    assert set(server.base.iterdir()) == before
    assert len(list((server.base / "output").glob("*.json"))) == 3


def test_attention_is_viewed(server):
    graph = Graph()
    stack = graph.add(
        "EditSlidersStackPrompts",
        clip=graph.clip(),
        source=SOURCE,
        edits=EDITS[0],
        source_guidance=1.0,
        edit_guidance=3.0,
    )
    view = graph.add(
        "EditSlidersViewAttention",
        model=injected(graph, graph.model()),
        conditioning=stack,
        latent=graph.add("EditSlidersSameNoise", latent=graph.noise(), images=[stack[0], 1]),
        vae=graph.add("VAELoader", vae_name="taef1"),
        seed=1,
        steps=1,
        picture=1,
        across=0.25,
        down=0.75,
        **LAYERS,
    )
    shown = graph.add("PreviewImage", images=[view[0], 0])
    samples = graph.save([view[0], 1])
    result = server.run(graph)
    assert result.ok, result.error
    assert result.images(shown[0])[0].size == (1200, 800)
    assert result.latent(samples).shape[0] == 2


def failing(name: str, part, node: str, message: str):
    return pytest.param(part, node, message, id=name)


@pytest.mark.parametrize(
    ("part", "node", "message"),
    [
        failing(
            "batch of one",
            lambda g: one_edit(g, injected(g, g.model())),
            "KSampler",
            "The batch has one image; expected source and edits in one batch",
        ),
        failing(
            "reference out of range",
            lambda g: parallel(g, g.model(), reference=5),
            "KSampler",
            "source_index is 5, but the batch has 3 images",
        ),
        failing(
            "sampler that adds noise",
            lambda g: g.sample(injected(g, g.model()), g.stock_text(SOURCE), sampler_name="euler_ancestral"),
            "KSampler",
            "The sampler 'euler_ancestral' adds new noise at every step",
        ),
        failing(
            "other schedule",
            lambda g: one_edit(g, from_memory(g, g.model(), remembered_source(g, g.model())), steps=3),
            "KSampler",
            "Sample the edits with the source's schedule (2 steps, scheduler simple)",
        ),
        failing(
            "other size",
            lambda g: one_edit(
                g,
                from_memory(g, g.model(), remembered_source(g, g.model())),
                latent=g.add("EmptySD3LatentImage", width=96, height=64, batch_size=1),
            ),
            "KSampler",
            "expected the same size",
        ),
        failing(
            "layer out of range",
            lambda g: one_edit(g, from_memory(g, g.model(), remembered_source(g, g.model(), list="1, 9"))),
            "EditSlidersRememberSource",
            "The model has no layer 9; expected layers from 0 to 3",
        ),
        failing(
            "nothing remembered",
            lambda g: edited(g, inverted(g), g.model(), REMEMBERED),
            "EditSlidersEditFromTrajectory",
            "The model has no cached source",
        ),
        failing(
            "another trajectory remembered",
            lambda g: edited(
                g,
                inverted(g),
                from_memory(g, g.model(), remembered_trajectory(g, inverted(g, nudging=1.1))),
                REMEMBERED,
            ),
            "EditSlidersEditFromTrajectory",
            "The model's cached source is not this trajectory",
        ),
        failing(
            "edits of no words",
            lambda g: edited(g, inverted(g), edits=" \n "),
            "EditSlidersEditFromTrajectory",
            "There is no prompt",
        ),
        failing(
            "edit longer than the source was padded to",
            lambda g: edited(g, inverted(g), edits="very " * 600 + "red cat"),
            "EditSlidersEditFromTrajectory",
            "an edit prompt is longer than 512 tokens",
        ),
        failing(
            "empty latent",
            lambda g: edited(g, inverted(g, latent=lambda g: g.noise())),
            "EditSlidersInvertPhotograph",
            "expected an image with 16 channels, from 'VAE Encode'",
        ),
        failing(
            "batch of photographs",
            lambda g: edited(g, inverted(g, latent=lambda g: g.add("RepeatLatentBatch", samples=g.photo(), amount=2))),
            "EditSlidersInvertPhotograph",
            "The latent has 2 images; expected one to invert",
        ),
        failing(
            "injection in the inversion",
            lambda g: edited(g, inverted(g, model=lambda g: injected(g, g.model()))),
            "EditSlidersInvertPhotograph",
            "The batch has one image",
        ),
        failing(
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
        failing(
            "half a schedule",
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
                source=FOLLOWS,
            ),
            "EditSlidersInvertPhotograph",
            "expected at least two that fall from at most 1 to 0",
        ),
    ],
)
def test_bad_graphs(server, part, node, message):
    graph = Graph()
    graph.save(part(graph))
    result = server.run(graph)
    assert not result.ok
    assert result.error["node_type"] == node
    assert message in result.error["exception_message"]


def test_files_that_are_no_trajectories(server):
    folder = server.base / "output" / "broken"
    folder.mkdir(parents=True)
    lora = server.base / "models" / "loras" / "gst_peft.safetensors"
    (folder / "lora.trajectory.safetensors").write_bytes(lora.read_bytes())
    (folder / "cut.trajectory.safetensors").write_bytes(lora.read_bytes()[:2000])
    for name, message in (("lora", "is not a trajectory"), ("cut", "cannot be read as a trajectory")):
        graph = Graph()
        loaded = graph.add("EditSlidersLoadTrajectory", file=f"broken/{name}.trajectory.safetensors [output]")
        graph.save(edited(graph, loaded))
        result = server.run(graph)
        assert result.error["node_type"] == "EditSlidersLoadTrajectory"
        assert message in result.error["exception_message"]
