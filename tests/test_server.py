"""Graphs over the HTTP API of a real ComfyUI."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from support.comfy_server import ComfyServer, PromptRejected, Result
from support.graphs import Graph, Link
from support.outcomes import differ, latents, near

from slider_core import node_names as names

TWO_LINES = "make the cat older\nmake the wall (golden:1.2)"
PROMPT = "make the cat older and make the wall (golden:1.2)"


def latent(server: ComfyServer, build: Callable[[Graph], Link]) -> np.ndarray:
    return latents(server, build)[0]


def failure(server: ComfyServer, build: Callable[[Graph], Link]) -> tuple[str, str]:
    """Node type and message of the error that stops a graph."""
    graph = Graph()
    graph.save(build(graph))
    result = server.run(graph)
    assert not result.ok
    return result.error["node_type"], result.error["exception_message"].strip()


def bare(graph: Graph, **more) -> Link:
    return graph.sample(graph.model(), graph.edited(graph.stock_text(PROMPT)), **more)


def two_sliders(*values, model=lambda g: g.stlora(g.model()), **more) -> Callable[[Graph], Link]:
    return lambda g: g.sample(model(g), g.edited(g.strengths(g.instructions(TWO_LINES), *values)), **more)


def one_slider(strength, model=lambda g: g.model(), name="gst_peft.safetensors", **more) -> Callable[[Graph], Link]:
    return lambda g: g.sample(g.gstlora(model(g), strength, name), g.edited(g.stock_text(PROMPT)), **more)


def free_memory(server: ComfyServer) -> None:
    """Drop all cached results and loaded models."""
    server.free()


def test_nodes_are_registered_with_descriptions_and_tooltips(server):
    info = {name: node for name, node in server.object_info().items() if name.startswith("EditSliders")}
    assert len(info) == 36
    for node in info.values():
        assert node["description"]
        assert node["category"].startswith("edit sliders/")
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert all(spec[1].get("tooltip") for spec in inputs.values()), node["name"]


def test_strength_one_equals_no_slider_bit_for_bit(server):
    without, st, gst = latents(server, bare, two_sliders(1.0, 1.0), one_slider(1.0))
    assert np.array_equal(without, st)
    assert np.array_equal(without, gst)
    assert np.array_equal(without, latent(server, two_sliders(1)))
    assert np.array_equal(without, latent(server, two_sliders()))


def test_without_padding_encoding_equals_clip_text_encode(server):
    def stock(g: Graph) -> Link:
        return g.sample(g.model(), g.edited(g.stock_text(PROMPT, length=None)))

    def ours(g: Graph) -> Link:
        return g.sample(g.model(), g.edited(g.instructions(TWO_LINES, pad_to_512=False)))

    expected, unpadded, padded = latents(server, stock, ours, bare)
    assert np.array_equal(expected, unpadded)
    assert differ(expected, padded)


def test_each_slider_changes_the_image(server):
    outs = latents(server, bare, two_sliders(0.3, 1), two_sliders(1, 0.3), two_sliders(0.3, 0.3), one_slider(0.3))
    for k, a in enumerate(outs):
        for b in outs[k + 1 :]:
            assert differ(a, b)


def test_a_moved_slider_reruns_no_upstream_node(server):
    for build in (two_sliders, one_slider):
        graphs = []
        for value in (0.41, 0.42):
            graph = Graph()
            graph.save(build(value)(graph))
            graphs.append(graph)
        assert server.run(graphs[0]).ok
        executed = {graphs[1][node]["class_type"] for node in server.run(graphs[1]).executed}
        upstream = {"UNETLoader", "EditSlidersLoadAdapter", "EditSlidersEncodeSubInstructions", "CLIPTextEncode"}
        assert "KSampler" in executed
        assert not executed & (upstream | {"EditSlidersApplySTLoRA"})


def test_repeated_bypassed_and_interrupted_runs(server):
    moved = two_sliders(0.2, 1.4, model=lambda g: g.gstlora(g.stlora(g.model()), 0.5))
    first, without = latent(server, moved), latent(server, bare)
    free_memory(server)
    assert np.array_equal(first, latent(server, moved))
    assert np.array_equal(without, latent(server, bare))

    graph = Graph()
    graph.save(two_sliders(0.2, 1.4, model=lambda g: g.gstlora(g.stlora(g.model()), 0.5), steps=2000)(graph))
    prompt = server.submit(graph)
    time.sleep(2)
    server.interrupt()
    assert server.wait(prompt).interrupted
    free_memory(server)
    assert np.array_equal(without, latent(server, bare))
    assert np.array_equal(first, latent(server, moved))


def test_branches_of_one_graph(server):
    branches = [two_sliders(0.2, 1), two_sliders(1, 0.2), one_slider(0.2), bare, one_slider(1.6)]
    together = latents(server, *branches)
    free_memory(server)
    for out, branch in zip(together, branches):
        assert np.array_equal(out, latent(server, branch))


def test_order_of_apply_nodes_and_loras(server):
    orders = [
        lambda g: g.gstlora(g.stlora(g.lora(g.model())), 0.4),
        lambda g: g.lora(g.stlora(g.gstlora(g.model(), 0.4))),
        lambda g: g.stlora(g.lora(g.gstlora(g.model(), 0.4))),
    ]
    outs = latents(server, *(two_sliders(0.3, 0.6, model=order) for order in orders))
    assert near(outs[0], outs[1])
    assert near(outs[0], outs[2])
    assert differ(outs[0], latent(server, two_sliders(0.3, 0.6, model=lambda g: g.gstlora(g.stlora(g.model()), 0.4))))


def test_cfg_with_a_negative_prompt(server):
    """One Euler step is linear in the guidance scale, so the three runs must lie on a line."""

    def build(cfg: float, positive: Callable[[Graph], Link], negative: Callable[[Graph], Link]) -> Callable:
        return lambda g: g.sample(g.stlora(g.model()), positive(g), negative(g), cfg=cfg, steps=1)

    def slid(g: Graph) -> Link:
        return g.edited(g.strengths(g.instructions(TWO_LINES), 0.2, 1.3))

    def plain(g: Graph) -> Link:
        return g.edited(g.stock_text("blurry"))

    cond, uncond, guided, short = latents(
        server,
        build(1.0, slid, slid),
        build(1.0, plain, plain),
        build(3.0, slid, plain),
        build(3.0, slid, lambda g: g.edited(g.stock_text("blurry", length=None))),
    )
    assert near(guided, uncond + 3.0 * (cond - uncond))
    assert differ(guided, short)
    both = latent(server, build(3.0, slid, slid))
    assert near(both, cond)


def test_combined_conds_keep_their_own_strengths(server):
    def slid(g: Graph, *values: float) -> Link:
        return g.edited(g.strengths(g.instructions(TWO_LINES), *values))

    def build(g: Graph) -> Link:
        both = g.add("ConditioningCombine", conditioning_1=slid(g, 0.2, 1), conditioning_2=slid(g, 1, 0.4))
        return g.sample(g.stlora(g.model()), both, steps=1)

    combined, first, second = latents(server, build, two_sliders(0.2, 1, steps=1), two_sliders(1, 0.4, steps=1))
    assert near(combined, (first + second) / 2)


@pytest.mark.parametrize("reference", [True, False])
def test_a_sweep_equals_single_runs(server, reference):
    values = (0.0, 0.6, 1.7)

    def sweep(adapter_type: str) -> Callable[[Graph], Link]:
        def build(g: Graph) -> Link:
            strengths = g.add("EditSlidersStrengthList", values="0, 0.6; 1.7")
            latent = g.add("EditSlidersLatentForSweep", latent=g.noise(), strengths=strengths)
            if adapter_type == "STLoRA":
                text = g.edited(g.strengths(g.instructions(TWO_LINES), strengths, 0.7), reference)
                return g.sample(g.stlora(g.model()), text, latent=latent)
            return g.sample(g.gstlora(g.model(), strengths), g.edited(g.stock_text(PROMPT), reference), latent=latent)

        return build

    def single(adapter_type: str, value: float) -> Callable[[Graph], Link]:
        def build(g: Graph) -> Link:
            if adapter_type == "STLoRA":
                return g.sample(
                    g.stlora(g.model()), g.edited(g.strengths(g.instructions(TWO_LINES), value, 0.7), reference)
                )
            return g.sample(g.gstlora(g.model(), value), g.edited(g.stock_text(PROMPT), reference))

        return build

    for adapter_type in ("STLoRA", "GSTLoRA"):
        swept = latent(server, sweep(adapter_type))
        assert swept.shape[0] == 3
        for k, one in enumerate(latents(server, *(single(adapter_type, value) for value in values))):
            assert near(swept[k : k + 1], one)
        assert differ(swept[0], swept[1])


def test_timestep_ranges(server):
    """A slider on the first half of the steps equals two samplers in a row, the second without the slider."""

    def slid(g: Graph) -> Link:
        return g.edited(g.strengths(g.instructions(TWO_LINES), 0.0, 1))

    def plain(g: Graph) -> Link:
        return g.edited(g.instructions(TWO_LINES))

    def ranged(g: Graph) -> Link:
        first = g.add("ConditioningSetTimestepRange", conditioning=slid(g), start=0.0, end=0.4)
        second = g.add("ConditioningSetTimestepRange", conditioning=plain(g), start=0.4, end=1.0)
        both = g.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)
        return g.sample(g.stlora(g.model()), both, steps=4)

    def two_samplers(g: Graph) -> Link:
        def run(text: Link, latent: Link, start: int, end: int) -> Link:
            return g.add(
                "KSamplerAdvanced",
                model=g.stlora(g.model()),
                positive=text,
                negative=text,
                latent_image=latent,
                add_noise="enable" if start == 0 else "disable",
                noise_seed=7,
                steps=4,
                cfg=1.0,
                sampler_name="euler",
                scheduler="simple",
                start_at_step=start,
                end_at_step=end,
                return_with_leftover_noise="enable" if end < 4 else "disable",
            )

        return run(plain(g), run(slid(g), g.noise(), 0, 2), 2, 4)

    in_range, expected, unlimited, without = latents(
        server, ranged, two_samplers, two_sliders(0.0, 1, steps=4), two_sliders(steps=4)
    )
    assert near(in_range, expected)
    assert differ(in_range, unlimited)
    assert differ(in_range, without)


def test_fp8_weights(server):
    def model(g: Graph) -> Link:
        return g.model("fp8_e4m3fn")

    def plain(g: Graph) -> Link:
        return g.sample(model(g), g.edited(g.stock_text(PROMPT)))

    slid = two_sliders(0.2, 1, model=lambda g: g.stlora(model(g)))
    without, strength_one, st, gst = latents(
        server, plain, two_sliders(1, 1, model=lambda g: g.stlora(model(g))), slid, one_slider(0.2, model)
    )
    assert np.array_equal(without, strength_one)
    assert differ(without, st)
    assert differ(without, gst)
    full = latents(server, bare, two_sliders(0.2, 1))
    effect = full[1] - full[0]
    cosine = float((effect * (st - without)).sum() / np.linalg.norm(effect) / np.linalg.norm(st - without))
    assert cosine > 0.9


def test_stock_torch_compile(server):
    def compiled(g: Graph, model: Link) -> Link:
        return g.add("TorchCompileModel", model=model, backend="inductor")

    graphs = [
        two_sliders(0.3, 1.5, model=lambda g: g.gstlora(g.stlora(compiled(g, g.model())), 0.6)),
        two_sliders(0.3, 1.5, model=lambda g: g.gstlora(g.stlora(g.model()), 0.6)),
        two_sliders(1.0, 0.2, model=lambda g: g.gstlora(g.stlora(compiled(g, g.model())), 0.9)),
        two_sliders(1.0, 0.2, model=lambda g: g.gstlora(g.stlora(g.model()), 0.9)),
    ]
    outs = latents(server, *graphs)
    assert np.allclose(outs[0], outs[1], atol=5e-3)
    assert np.allclose(outs[2], outs[3], atol=5e-3)
    assert differ(outs[0], outs[2])


def test_lora_branch_equals_the_stock_loader(server):
    def merged(strength: float) -> Callable[[Graph], Link]:
        return lambda g: g.sample(g.lora(g.model(), "gst_peft.safetensors", strength), g.edited(g.stock_text(PROMPT)))

    for strength in (0.3, -0.2, 1.5):
        ours, stock = latents(server, one_slider(strength), merged(1.0 - strength))
        assert near(ours, stock)
    ours, stock = latents(server, one_slider(0.3, name="gst_peft_alpha.safetensors"), merged(1.4))
    assert near(ours, stock)


def test_equal_results_for_every_file_format(server):
    files = ("gst_peft.safetensors", "gst_kohya.safetensors", "gst_comfy_names.safetensors")
    outs = latents(server, *(one_slider(0.2, name=file) for file in files))
    assert all(near(outs[0], out) for out in outs[1:])
    files = ("selective_lora.pt", "st_comfy_names.safetensors")
    outs = latents(
        server, *(two_sliders(0.2, 1.2, model=lambda g, file=file: g.stlora(g.model(), file)) for file in files)
    )
    assert near(*outs)


def test_texts_shown_on_nodes(server):
    graph = Graph()
    graph.save(two_sliders(0.5, 0.5)(graph))
    graph.save(one_slider(0.5)(graph))
    result = server.run(graph)
    texts = {}
    for node in graph:
        if "text" in result.outputs.get(node, {}):
            texts.setdefault(graph[node]["class_type"], []).append(result.text(node))
    adapters = "\n".join(texts["EditSlidersLoadAdapter"])
    assert "selective_lora.pt: STLoRA" in adapters
    assert "gst_peft.safetensors: GSTLoRA" in adapters
    assert "rank: 4" in adapters
    assert "1  make the cat older" in texts["EditSlidersEncodeSubInstructions"][0]


def test_lines_marks_and_selected_phrases_are_equal(server):
    """The same spans from lines, from marks, and from Select Phrase nodes after ComfyUI's own text encode node."""

    def build(conditioning: Callable[[Graph], Link]) -> Callable[[Graph], Link]:
        return lambda g: g.sample(g.stlora(g.model()), g.edited(g.strengths(conditioning(g), 0.1, 1.4)))

    def marked(g: Graph) -> Link:
        return g.instructions("[[make the cat older]] and [[make the wall (golden:1.2)]]", "[[marked]] phrases")

    def phrases(length: int | None) -> Callable[[Graph], Link]:
        def conditioning(g: Graph) -> Link:
            out = g.stock_text(PROMPT, length)
            for phrase in ("make the cat older", "make the wall golden"):
                out = g.add(
                    "EditSlidersSelectPhrase",
                    conditioning=out,
                    clip=g.clip(),
                    prompt=PROMPT,
                    phrase=phrase,
                    occurrence=1,
                )
            return out

        return conditioning

    lines, marks, selected = latents(
        server, build(lambda g: g.instructions(TWO_LINES)), build(marked), build(phrases(512))
    )
    assert np.array_equal(lines, marks)
    assert np.array_equal(lines, selected)
    short, unpadded = latents(
        server, build(phrases(None)), build(lambda g: g.instructions(TWO_LINES, pad_to_512=False))
    )
    assert np.array_equal(short, unpadded)


def select(phrase: str, prompt: str = PROMPT, occurrence: int = 1, text=None) -> Callable[[Graph], Link]:
    def build(g: Graph) -> Link:
        spanned = g.add(
            "EditSlidersSelectPhrase",
            conditioning=text(g) if text else g.stock_text(PROMPT),
            clip=g.clip(),
            prompt=prompt,
            phrase=phrase,
            occurrence=occurrence,
        )
        return g.sample(g.stlora(g.model()), g.edited(g.strengths(spanned, 0.5)))

    return build


def encode(text: str, mode: str = "one per line") -> Callable[[Graph], Link]:
    return lambda g: g.sample(g.model(), g.edited(g.instructions(text, mode)))


def gst(name: str) -> Callable[[Graph], Link]:
    return one_slider(0.5, name=name)


INVALID = {
    "dora": (gst("dora.safetensors"), "LoadAdapter", "dora_scale"),
    "wrong width": (gst("wrong_width.safetensors"), "ApplyGSTLoRA", "hidden size 128"),
    "too deep": (gst("too_deep.safetensors"), "ApplyGSTLoRA", "blocks.7"),
    "other family": (gst("other_family.safetensors"), "LoadAdapter", "not linears of a supported model (FLUX.1)"),
    "truncated": (gst("truncated.safetensors"), "LoadAdapter", "cannot be read"),
    "empty file": (gst("empty.safetensors"), "LoadAdapter", "cannot be read"),
    "hostile": (gst("hostile.pt"), "LoadAdapter", "contains only tensors"),
    "not a dict": (gst("not_a_dict.pt"), "LoadAdapter", "cannot be read"),
    "no tensors": (gst("no_tensors.pt"), "LoadAdapter", "is not a tensor"),
    "st as gst": (gst("selective_lora.pt"), "ApplyGSTLoRA", f"Use '{names.APPLY_STLORA}'"),
    "gst as st": (
        two_sliders(0.5, model=lambda g: g.stlora(g.model(), "gst_peft.safetensors")),
        "ApplySTLoRA",
        "single",
    ),
    "nan": (two_sliders(math.nan), None, "strength_1 is nan; expected a number from -100 to 100"),
    "infinite": (two_sliders(1, math.inf), None, "strength_2 is inf; expected a number"),
    "minus infinite": (one_slider(-math.inf), None, "strength is -inf; expected a number"),
    "huge": (one_slider(1e300), None, "strength is 1e+300; expected a number from -100 to 100"),
    "many digits": (two_sliders(10**400), None, "strength_1 is an integer out of range"),
    "text as strength": (one_slider("nan"), None, "strength is 'nan'; expected a number"),
    "too many strengths": (
        two_sliders(1, 1, 0.5),
        "SubInstructionStrengths",
        "only 2 instruction(s): 'make the cat",
    ),
    "too few strengths": (
        lambda g: g.sample(g.model(), g.strengths(g.instructions("\n".join(f"add hat {k}" for k in range(9))), 0.5)),
        "SubInstructionStrengths",
        "9 instructions but only 8",
    ),
    "no spans": (
        lambda g: g.sample(g.stlora(g.model()), g.strengths(g.stock_text(PROMPT), 0.5)),
        "SubInstructionStrengths",
        names.ENCODE_INSTRUCTIONS,
    ),
    "empty prompt": (encode("  \n "), "EncodeSubInstructions", "prompt is empty"),
    "no marks": (encode("make it red", "[[marked]] phrases"), "EncodeSubInstructions", "No phrase is marked"),
    "open mark": (encode("[[make it red", "[[marked]] phrases"), "EncodeSubInstructions", "not closed"),
    "absent phrase": (select("the wall golden hat"), "SelectPhrase", "the most similar text is 'the wall golden'"),
    "occurrence": (select("make the", occurrence=3), "SelectPhrase", "occurs 2 time(s)"),
    "other encoder": (
        select("older", text=lambda g: g.stock_text(PROMPT, length=300)),
        "SelectPhrase",
        "300 text tokens, but this text encoder gives 256",
    ),
    "more strengths than images": (
        lambda g: g.sample(
            g.stlora(g.model()),
            g.strengths(g.instructions(TWO_LINES), g.add("EditSlidersStrengthList", values="0 0.5")),
        ),
        "KSampler",
        "2 strengths for a batch of 1",
    ),
    "unequal lists": (
        lambda g: g.sample(
            g.stlora(g.model()),
            g.strengths(
                g.instructions(TWO_LINES),
                g.add("EditSlidersStrengthList", values="0 0.5"),
                g.add("EditSlidersStrengthRange", first=0.0, last=1.0, count=3),
            ),
        ),
        "SubInstructionStrengths",
        "differ in length",
    ),
    "no number": (
        lambda g: g.sample(g.gstlora(g.model(), g.add("EditSlidersStrengthList", values="0, half")), g.stock_text("a")),
        "StrengthList",
        "'half' is not a number",
    ),
    "empty list": (
        lambda g: g.sample(g.gstlora(g.model(), g.add("EditSlidersStrengthList", values=" ")), g.stock_text("a")),
        "StrengthList",
        "empty list",
    ),
    "outside the folder": (gst("../../diffusion_models/tiny-kontext.safetensors"), None, "not in list"),
    "absolute path": (gst("/etc/passwd"), None, "not in list"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_input(server, case):
    build, node, message = INVALID[case]
    if node is None:
        graph = Graph()
        graph.save(build(graph))
        with pytest.raises(PromptRejected) as refused:
            server.run(graph)
        assert message in str(refused.value)
        return
    failed_node, text = failure(server, build)
    assert failed_node == ("" if node == "KSampler" else "EditSliders") + node
    assert message in text
    assert not (server.base / "models" / "PWNED").exists()


def test_invalid_input_does_not_change_the_model(server):
    first = latents(server, bare, two_sliders(0.2, 1.4))
    for build in (gst("too_deep.safetensors"), two_sliders(1, 1, 0.5), INVALID["more strengths than images"][0]):
        failure(server, build)
    free_memory(server)
    assert all(np.array_equal(a, b) for a, b in zip(first, latents(server, bare, two_sliders(0.2, 1.4))))


def test_image_output(server):
    graph = Graph()
    samples = two_sliders(0.5, 1)(graph)
    vae = graph.add("VAELoader", vae_name="taef1")
    node = graph.add("PreviewImage", images=graph.add("VAEDecode", samples=samples, vae=vae))[0]
    result: Result = server.run(graph)
    [image] = result.images(node)
    assert image.size == (64, 64)
