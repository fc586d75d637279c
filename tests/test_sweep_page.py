"""Sweeps of the Edit Strength Sliders node in the page: the filmstrip, selecting an image, saving."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator
from support.browser import ComfyPage
from support.screenshots import FILMSTRIP, screenshot_of
from support.slider_page import (
    NODE,
    idle,
    job_history,
    live,
    live_graph,
    move_into_subgraph,
    number,
    open_graph,
    prompt_box,
    show,
    slider,
    strengths,
    wait_for,
)


@pytest.fixture
def page(view: ComfyPage) -> ComfyPage:
    open_graph(view, live_graph())
    set_sweep(view, [{"slider": 0, "from": 0, "to": 1.5, "count": 4}], 2)
    return view


def set_sweep(view: ComfyPage, axes: list[dict], batch_size: int) -> None:
    """Fill in the form of the sweep."""
    details = view.page.locator(".es-filmstrip details")
    details.evaluate("element => element.open = true")
    for k, axis in enumerate(axes):
        line = view.page.locator(".es-axis").nth(k)
        line.locator("select").select_option(str(axis["slider"]))
        for box, name in enumerate(("from", "to", "count")):
            line.locator("input").nth(box).fill(str(axis[name]))
            line.locator("input").nth(box).press("Enter")
    view.page.locator(".es-filmstrip details > label input").fill(str(batch_size))
    view.page.locator(".es-filmstrip details > label input").press("Enter")


def sweep_button(view: ComfyPage) -> Locator:
    return view.page.locator(".es-sweep")


def frames(view: ComfyPage) -> Locator:
    return view.page.locator(".es-frame")


def run_sweep(view: ComfyPage, count: int) -> None:
    sweep_button(view).click()
    view.page.wait_for_function(
        "count => document.querySelectorAll('.es-frame img').length === count"
        " && document.querySelector('.es-sweep').textContent.includes('sweep')",
        arg=count,
    )


def image_shown(view: ComfyPage) -> str:
    return view.page.evaluate("document.querySelector('.es-image').src")


def pixels(view: ComfyPage, url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(view.page.request.get(url).body())).convert("RGB")).astype(float)


def image_urls(view: ComfyPage) -> list[str]:
    return view.page.evaluate("[...document.querySelectorAll('.es-frame img')].map(image => image.src)")


@pytest.mark.newer_frontend_too
def test_one_job_fills_the_filmstrip_and_scrubbing_queues_nothing(server, page):
    before = set(job_history(server))
    run_sweep(page, 4)
    [new] = set(job_history(server)) - before
    copied = [
        node["class_type"] for key, node in job_history(server)[new]["prompt"][2].items() if key.startswith("sweep")
    ]
    assert copied.count("KSampler") == 2
    assert "UNETLoader" not in copied
    assert frames(page).all_inner_texts() == ["0", "0.5", "1", "1.5"]
    live(page).check()
    wait_for(lambda: len(set(job_history(server)) - before) == 2 and idle(server))
    page.page.wait_for_timeout(500)
    after = set(job_history(server))

    page.page.locator(".es-scrub").focus()
    page.page.keyboard.press("End")
    page.page.keyboard.press("Home")
    shown = [image_shown(page)]
    for _ in range(3):
        page.page.keyboard.press("ArrowRight")
        shown.append(image_shown(page))
    assert shown == image_urls(page)
    box = page.page.locator(".es-frames").bounding_box()
    page.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 8)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 8)
    assert image_shown(page) == image_urls(page)[1]
    page.page.mouse.move(box["x"] - 50, box["y"] + 300)
    page.page.mouse.up()
    assert image_shown(page) == image_urls(page)[0]
    assert strengths(page) == [1, 1, 1]
    page.page.wait_for_timeout(800)
    assert set(job_history(server)) == after
    live(page).uncheck()
    assert page.errors == []


def test_images_are_those_of_single_runs(server, page):
    run_sweep(page, 4)
    sweep = [pixels(page, url) for url in image_urls(page)]
    before = set(job_history(server))
    number(page, 0).fill("0.5")
    number(page, 0).press("Enter")
    live(page).check()
    wait_for(lambda: set(job_history(server)) - before and idle(server))
    page.page.wait_for_function("!document.querySelector('.es-image').src.startsWith('blob:')")
    page.page.wait_for_timeout(300)
    single = pixels(page, image_shown(page))
    live(page).uncheck()
    distances = [np.abs(image - single).mean() for image in sweep]
    assert np.argmin(distances) == 1
    assert distances[1] < 0.5 < 1.5 * min(distances[0], distances[2])


def test_strengths_of_the_selected_image_are_applied(page):
    run_sweep(page, 4)
    page.page.locator(".es-frames").focus()
    page.page.keyboard.press("End")
    page.page.locator(".es-filmstrip button", has_text="apply").click()
    assert strengths(page) == [1.5, 1, 1]
    assert page.page.locator(".es-frame[aria-selected=true]").inner_text() == "1.5"


@pytest.mark.newer_frontend_too
def test_two_sliders_make_a_grid(server, page):
    across = {"slider": 1, "from": -0.5, "to": 1, "count": 3}
    set_sweep(page, [across, {"slider": 0, "from": 0, "to": 1, "count": 2}], 4)
    run_sweep(page, 6)
    assert page.page.locator(".es-scrub").is_hidden()
    captions = [frame.get_attribute("aria-label") for frame in frames(page).all()]
    assert captions == ["-0.5 / 0", "0.25 / 0", "1 / 0", "-0.5 / 1", "0.25 / 1", "1 / 1"]
    box = page.page.locator(".es-frames").bounding_box()
    page.page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.75)
    assert image_shown(page) == image_urls(page)[4]
    page.page.keyboard.press("ArrowUp")
    assert image_shown(page) == image_urls(page)[1]
    page.page.locator(".es-filmstrip button", has_text="apply").click()
    assert strengths(page) == [0, 0.25, 1]


@pytest.mark.parametrize(
    ("kind", "name"), [("webp", "sweep.webp"), ("strip", "sweep_strip.png"), ("grid", "sweep_grid.png")]
)
def test_saved_as_one_file(page, kind, name):
    run_sweep(page, 4)
    page.page.locator(".es-filmstrip .es-bar select").select_option(kind)
    with page.page.expect_download() as download:
        page.page.locator(".es-filmstrip button", has_text="save").click()
    assert download.value.suggested_filename == name
    file = Image.open(download.value.path())
    if kind == "webp":
        assert file.n_frames == 6
    else:
        assert '"EditSlidersSliderPrompt"' in file.text["workflow"]
        assert file.width == 4 * 64 + 3 * 6


@pytest.mark.newer_frontend_too
def test_frames_survive_undo_and_other_tabs(page):
    tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker"
    page.page.evaluate(f"{tracker}.captureCanvasState()")
    run_sweep(page, 4)
    urls = image_urls(page)
    number(page, 0).fill("0.4")
    number(page, 0).press("Enter")
    page.page.evaluate(f"{tracker}.captureCanvasState()")
    for _ in range(2):  # the second undo reverts the change of the node's size
        page.page.evaluate(f"{tracker}.undo()")
        page.page.wait_for_timeout(1000)
        show(page)
        assert image_urls(page) == urls
    page.page.locator(".es-frames").focus()
    page.page.keyboard.press("End")
    assert image_shown(page) == urls[3]

    name = page.page.evaluate("app.extensionManager.workflow.activeWorkflow.path")
    page.page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.page.wait_for_function("app.graph.nodes.length === 0")
    open_graph(page, live_graph())
    page.page.wait_for_timeout(700)
    assert image_urls(page) == []
    assert image_shown(page) == ""
    page.page.evaluate(
        """async path => {
            const { workflow } = app.extensionManager
            await app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')
            while (workflow.activeWorkflow.path !== path)
                await app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')
        }""",
        name,
    )
    page.page.wait_for_function("kept => document.querySelectorAll('.es-frame img').length === kept", arg=4)
    assert image_urls(page) == urls
    assert page.errors == []


def test_a_sweep_can_be_stopped(server, view):
    open_graph(view, live_graph(steps=3000))
    before = set(job_history(server))
    sweep_button(view).click()
    wait_for(lambda: not idle(server))
    view.page.wait_for_function("document.querySelector('.es-sweep').textContent.includes('stop')")
    sweep_button(view).click()
    wait_for(lambda: idle(server) and set(job_history(server)) == before)
    view.page.wait_for_function("document.querySelector('.es-sweep').textContent.includes('sweep')")
    assert image_urls(view) == []


def test_a_moved_slider_leaves_a_sweep_alone(server, view):
    open_graph(view, live_graph(steps=8))
    set_sweep(view, [{"slider": 0, "from": 0, "to": 1, "count": 2}], 1)
    before = set(job_history(server))
    live(view).check()
    sweep_button(view).click()
    wait_for(lambda: not idle(server))
    slider(view, 0).focus()
    view.page.keyboard.press("ArrowLeft")
    wait_for(lambda: idle(server) and len(set(job_history(server)) - before) >= 2)
    live(view).uncheck()
    assert frames(view).locator("img").count() == 2


def test_a_sweep_stays_with_its_phrase(page):
    set_sweep(page, [{"slider": 1, "from": 0, "to": 1, "count": 2}], 2)
    run_sweep(page, 2)
    prompt_box(page).fill("make it night\n" + prompt_box(page).input_value())
    summary = page.page.locator(".es-filmstrip summary")
    assert summary.inner_text() == "make the wall golden: 0 to 1, 2 images"
    page.page.locator(".es-frames").focus()
    page.page.keyboard.press("Home")
    page.page.locator(".es-filmstrip button", has_text="apply").click()
    assert strengths(page) == [1, 1, 0]


def test_graphs_of_sweeps_and_of_fewer_steps(view):
    """Chained samplers, decoding and encoding between them, nodes that are not copied, limited steps."""
    found = view.page.evaluate(
        """async () => {
            const { sweepGraph, limitSteps, descendants, queuedNodeIds, sweepStrengths } =
                await import('/extensions/ComfyUI-EditSliders/shared/api_graph.mjs')
            const node = (class_type, inputs) => ({ class_type, inputs })
            const graph = {
                1: node('EditSlidersSliderPrompt', { text: 'a', strength_1: 1 }),
                2: node('ReferenceLatent', { conditioning: ['1', 0], latent: ['9', 0] }),
                3: node('KSampler', { positive: ['2', 0], negative: ['8', 0], latent_image: ['9', 0], steps: 20 }),
                4: node('VAEDecode', { samples: ['3', 0] }),
                5: node('VAEEncode', { pixels: ['4', 0] }),
                6: node('KSampler', { positive: ['2', 0], negative: ['8', 0], latent_image: ['5', 0], steps: 4 }),
                7: node('VAEDecode', { samples: ['6', 0] }),
                8: node('CLIPTextEncode', { text: '' }),
                9: node('EmptyLatentImage', {}),
                10: node('SaveImage', { images: ['7', 0] }),
                '11:1': node('EditSlidersSliderPrompt', {}),
                12: node('KSampler', { positive: ['8', 0], latent_image: ['9', 0], steps: 20 }),
            }
            const definitions = await (await fetch('/object_info')).json()
            const axes = [{ slider: 0, from: 0, to: 1, count: 3 }]
            const { graph: swept, targets } = sweepGraph(graph, '1', definitions, axes, 2)
            const limited = limitSteps(graph, descendants(graph, ['1']), definitions, 8)
            return {
                swept, targets, outer: queuedNodeIds(graph, 1, false), inner: queuedNodeIds(graph, 1, true),
                steps: [limited[3].inputs.steps, limited[6].inputs.steps, limited[12].inputs.steps],
                grid: sweepStrengths([{ from: 0, to: 1, count: 2 }, { from: 2, to: 3, count: 2 }]),
                nothing: sweepGraph({ 1: graph[1] }, '1', definitions, axes, 2) === undefined,
            }
        }"""
    )
    swept = found["swept"]
    assert found["targets"] == ["sweep0_images", "sweep2_images"]
    assert [swept[f"sweep{k}_strengths0"]["inputs"]["values"] for k in (0, 2)] == ["0, 0.5", "1"]
    for sampler, source in (("3", "9"), ("6", "sweep0_5")):
        latent = swept[f"sweep0_{sampler}"]["inputs"]["latent_image"]
        assert swept[latent[0]]["class_type"] == "EditSlidersLatentForSweep"
        assert swept[latent[0]]["inputs"]["latent"] == [source, 0]
    assert swept["sweep0_2"]["inputs"] == {"conditioning": ["sweep0_1", 0], "latent": ["9", 0]}
    assert swept["sweep0_1"]["inputs"]["strength_1"] == ["sweep0_strengths0", 0]
    assert swept["sweep0_images"]["inputs"]["images"] == ["sweep0_7", 0]
    assert not {"sweep0_8", "sweep0_9", "sweep0_10", "sweep0_12"} & set(swept)
    assert (found["outer"], found["inner"]) == (["1"], ["11:1"])
    assert found["steps"] == [8, 4, 20]
    assert found["grid"] == [[0, 2], [1, 2], [0, 3], [1, 3]]
    assert found["nothing"]


def test_sliders_that_cannot_be_swept_are_reported(page):
    alert = page.page.locator("[role=alert]")
    set_sweep(page, [{"slider": 1, "from": 0, "to": 1, "count": 2}], 2)
    prompt_box(page).fill("make it night")
    sweep_button(page).click()
    assert "The sweep uses slider 2, but the number of sliders is 1" in alert.inner_text()
    graph = live_graph()
    [key] = [key for key, node in graph.items() if node["class_type"] == NODE]
    graph[key]["inputs"]["strength_1"] = graph.add("PrimitiveFloat", value=0.7)
    open_graph(page, graph)
    sweep_button(page).click()
    assert "Slider 1 comes from another node" in alert.inner_text()


def test_a_failed_sweep_shows_the_error(page):
    page.set_widget("UNETLoader", "unet_name", "gone.safetensors")
    sweep_button(page).click()
    page.page.wait_for_function("document.querySelector('[role=alert]')?.textContent.includes('gone.safetensors')")
    assert "sweep" in sweep_button(page).inner_text()


def test_the_filmstrip_image_of_the_help_page_is_current(view, assert_up_to_date):
    open_graph(view, live_graph())
    if not view.page.evaluate("app.extensionManager.setting.get('Comfy.VueNodes.Enabled')"):
        return
    run_sweep(view, 7)
    assert_up_to_date(FILMSTRIP, screenshot_of(view, (NODE,), 384))


def test_the_form_is_saved_and_invalid_values_are_replaced(page):
    set_sweep(page, [{"slider": 1, "from": -1, "to": 0.5, "count": 3}], 3)
    workflow = page.page.evaluate("app.graph.serialize()")
    page.open(workflow)
    show(page)
    assert page.page.locator(".es-filmstrip summary").inner_text() == "make the wall golden: -1 to 0.5, 3 images"
    [node] = [node for node in workflow["nodes"] if node["type"] == NODE]
    node["properties"]["sweep"] = {"axes": [{"slider": "x", "from": None, "count": 1e9}, 5], "atOnce": -3}
    page.open(workflow)
    show(page)
    shown = page.page.locator(".es-filmstrip summary").inner_text()
    assert shown.startswith("make the cat older: 0 to 1.5, 32 images")
    assert page.errors == []


def test_in_a_subgraph(server, page):
    move_into_subgraph(page)
    set_sweep(page, [{"slider": 0, "from": 0, "to": 1, "count": 2}], 2)
    run_sweep(page, 2)
    assert page.errors == []
