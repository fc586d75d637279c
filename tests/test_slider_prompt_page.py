"""The Edit Strength Sliders node over the API and in the page, on the canvas and in Nodes 2.0."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO
from support.browser import ComfyPage
from support.comfy_server import PromptRejected
from support.graphs import Graph
from support.outcomes import differ, latents, near
from support.slider_page import (
    NODE,
    TWO_INSTRUCTIONS,
    idle,
    inputs,
    job_history,
    live,
    live_graph,
    move_into_subgraph,
    number,
    open_graph,
    phrases,
    prompt_box,
    prompt_graph,
    queued_job_ids,
    rows,
    show,
    slider,
    strengths,
    wait_for,
)

SPLITTER_CASES = REPO / "tests" / "data" / "instruction_splitter_cases.json"  # Python's splitter is tested on them too
SPLIT = """
import { readFileSync } from 'node:fs'
const [phrases, cases] = process.argv.slice(1)
const { parse } = await import(phrases)
const results = JSON.parse(readFileSync(cases, 'utf8')).map(({ text, mode }) => {
    const { phrases, error } = parse(text, mode)
    return error ? null : phrases.map(phrase => phrase.text)
})
console.log(JSON.stringify(results))
"""


@pytest.fixture
def page(view: ComfyPage) -> ComfyPage:
    open_graph(view, prompt_graph())
    return view


@pytest.mark.newer_frontend_too
def test_one_slider_per_line(page):
    assert phrases(page) == ["make the cat older", "make the wall golden"]
    prompt_box(page).fill("one\n\n  two \nthree")
    assert phrases(page) == ["one", "two", "three"]
    assert inputs(page)["text"] == "one\n\n  two \nthree"
    assert page.page.locator(".es-highlights mark").all_inner_texts() == ["one", "two", "three"]
    assert page.errors == []


@pytest.mark.newer_frontend_too
def test_dragged_by_the_mouse(page):
    box = slider(page, 1).bounding_box()
    page.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    page.page.mouse.down()
    for fraction in (0.5, 0.4, 0.3):
        page.page.mouse.move(box["x"] + box["width"] * fraction, box["y"] + box["height"] / 2)
    page.page.mouse.up()
    first, second, third = strengths(page)
    assert first == third == 1
    assert second == pytest.approx(-0.5 + 0.3 * 2.5, abs=0.1)
    assert float(number(page, 1).input_value()) == second
    rows(page).nth(1).locator(".es-phrase").dblclick()
    assert strengths(page) == [1, 1, 1]


@pytest.mark.newer_frontend_too
def test_moved_by_keys_and_typed(page):
    slider(page, 0).focus()
    for key in ("ArrowLeft", "ArrowLeft", "Shift+ArrowRight"):
        page.page.keyboard.press(key)
    assert strengths(page) == [0.91, 1, 1]
    page.page.keyboard.press("Home")
    assert strengths(page)[0] == 0
    number(page, 1).fill("2.5")
    number(page, 1).press("Enter")
    assert strengths(page) == [0, 2.5, 1]
    number(page, 1).fill("")
    number(page, 1).press("Enter")
    assert number(page, 1).input_value() == "2.5"
    assert slider(page, 1).get_attribute("aria-label") == "strength of make the wall golden"


def test_strengths_stay_with_their_phrases(page):
    number(page, 1).fill("0.3")
    number(page, 1).press("Enter")
    prompt_box(page).fill("make it night\n" + TWO_INSTRUCTIONS)
    assert strengths(page) == [1, 1, 0.3]
    prompt_box(page).fill("make the wall (golden:1.2)")
    assert strengths(page) == [0.3, 1, 1]


def test_strengths_stay_while_a_mark_is_being_typed(page):
    page.set_widget(NODE, "mode", "[[marked]] phrases")
    prompt_box(page).fill("a [[red]] b [[blue]]")
    number(page, 0).fill("0.3")
    number(page, 0).press("Enter")
    number(page, 1).fill("0.7")
    number(page, 1).press("Enter")
    prompt_box(page).fill("a [red]] b [[blue]]")
    prompt_box(page).fill("a [[red]] b [[blue]]")
    assert strengths(page) == [0.3, 0.7, 1]


def test_lines_are_split_like_on_the_server(page):
    prompt_box(page).evaluate(
        """area => {
            area.value = 'older\u2028golden\u0085hat'
            area.dispatchEvent(new Event('input'))
        }"""
    )
    assert phrases(page) == ["older", "golden", "hat"]
    assert page.page.locator(".es-highlights mark").all_inner_texts() == ["older", "golden", "hat"]


def test_the_page_splits_prompts_as_the_server_does():
    node = Path(sys.executable).with_name("node.exe" if sys.platform == "win32" else "node")
    script = (REPO / "web" / "slider_prompt" / "phrases.mjs").as_uri()
    command = [node, "--input-type=module", "--eval", SPLIT, script, SPLITTER_CASES]
    output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    cases = json.loads(SPLITTER_CASES.read_text(encoding="utf-8"))
    for case, split in zip(cases, json.loads(output), strict=True):
        assert split == case["phrases"], case


def test_buttons(page):
    def click(name: str) -> None:
        page.page.locator(".es-bar").get_by_text(name).click()

    number(page, 0).fill("0.2")
    number(page, 0).press("Enter")
    click("copy")
    click("reset")
    assert strengths(page) == [1, 1, 1]
    click("paste")
    assert strengths(page) == [0.2, 1, 1]
    click("link")
    slider(page, 0).focus()
    page.page.keyboard.press("ArrowRight")
    assert strengths(page) == [0.25, 1.05, 1]
    click("link")
    click("randomize")
    assert all(0 <= value <= 1 for value in strengths(page)[:2])


def test_marked_phrases_and_their_errors(page):
    page.set_widget(NODE, "mode", "[[marked]] phrases")
    error = page.page.locator(".es-error[role=status]")
    assert "No phrase is marked" in error.inner_text()
    prompt_box(page).fill("a [[red (cat:1.3)]] on a [[sofa")
    assert "not closed" in error.inner_text()
    prompt_box(page).fill("a [[red (cat:1.3)]] on a [[sofa]]")
    assert phrases(page) == ["red cat", "sofa"]
    assert error.inner_text() == ""


@pytest.mark.newer_frontend_too
def test_saved_and_opened_again(page):
    number(page, 0).fill("0.4")
    number(page, 0).press("Enter")
    before = inputs(page)
    workflow = page.page.evaluate("app.graph.serialize()")
    [node] = [node for node in workflow["nodes"] if node["type"] == NODE]
    page.open(workflow)
    show(page)
    assert inputs(page) == before
    assert number(page, 0).input_value() == "0.4"

    names = ["text", "mode", "pad_to_512", "lowest", "highest", "channel"]
    at = len(names)
    node["widgets_values"] = node["widgets_values"][: at + 2]  # as an older version with fewer sliders saved it
    page.open(workflow)
    show(page)
    assert strengths(page) == [0.4, 1, 1]
    node["widgets_values"][at : at + 2] = ["much", None]
    page.open(workflow)
    show(page)
    assert strengths(page) == [1, 1, 1]
    node["widgets_values"][names.index("lowest")] = "much"
    page.open(workflow)
    show(page)
    slider(page, 0).focus()
    page.page.keyboard.press("ArrowLeft")
    assert strengths(page) == [0.95, 1, 1]
    assert inputs(page)["lowest"] == -0.5
    assert page.errors == []


@pytest.mark.newer_frontend_too
def test_undone_and_redone(page):
    page.page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()")
    number(page, 0).fill("0.4")
    number(page, 0).press("Enter")
    page.page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()")
    page.page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    page.page.wait_for_function("document.querySelector('.es-row input[type=number]')?.value === '1'")
    show(page)
    slider(page, 1).focus()
    page.page.keyboard.press("ArrowLeft")
    assert strengths(page) == [1, 0.95, 1]


@pytest.mark.newer_frontend_too
def test_linked_inputs(view):
    g = prompt_graph()
    [key] = [key for key, node in g.items() if node["class_type"] == NODE]
    g[key]["inputs"]["strength_2"] = g.add("PrimitiveFloat", value=0.7)
    open_graph(view, g)
    assert slider(view, 1).is_disabled()
    assert slider(view, 0).is_enabled()
    g[key]["inputs"]["text"] = g.add("PrimitiveStringMultiline", value=TWO_INSTRUCTIONS)
    open_graph(view, g)
    assert prompt_box(view).is_disabled()
    assert phrases(view) == ["1", "2", "3", "4"]
    assert view.errors == []


def test_two_nodes_in_one_graph(view):
    g = prompt_graph()
    for key, node in prompt_graph("make it night").items():
        g[f"second_{key}"] = {
            **node,
            "inputs": {
                name: [f"second_{value[0]}", value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            },
        }
    view.page.evaluate("graph => app.loadApiJson(graph, 'test')", g)
    rows(view).nth(2).wait_for(state="attached")
    assert sorted(phrases(view)) == ["make it night", "make the cat older", "make the wall golden"]


def test_same_image_as_with_separate_encode_and_strength_nodes(server):
    def one_node(g: Graph):
        conditioning = g.add(
            NODE,
            clip=g.clip(),
            text=TWO_INSTRUCTIONS,
            mode="one per line",
            pad_to_512=True,
            lowest=-0.5,
            highest=2.0,
            strength_1=0.2,
            strength_2=1.4,
        )
        return g.sample(g.stlora(g.model()), g.edited(conditioning))

    def two_nodes(*values: float):
        return lambda g: g.sample(g.stlora(g.model()), g.edited(g.strengths(g.instructions(TWO_INSTRUCTIONS), *values)))

    ours, same, other = latents(server, one_node, two_nodes(0.2, 1.4), two_nodes(1, 1))
    assert near(ours, same)
    assert differ(ours, other)


def test_invalid_strengths_are_refused(server):
    with pytest.raises(PromptRejected) as refusal:
        server.submit(prompt_graph(strength_2="nan"))
    assert "strength_2 is 'nan'; expected a number" in str(refusal.value)
    with pytest.raises(PromptRejected, match=r"strength_1 is 1e\+30; expected a number from -100 to 100"):
        server.submit(prompt_graph(strength_1=1e30))


# --- live


@pytest.mark.newer_frontend_too
def test_live_runs_the_newest_state_only(server, view):
    open_graph(view, live_graph())
    before = set(job_history(server))
    live(view).check()
    box = slider(view, 0).bounding_box()
    y = box["y"] + box["height"] / 2
    view.page.mouse.move(box["x"] + box["width"] * 0.6, y)
    view.page.mouse.down()
    for k in range(80):
        view.page.mouse.move(box["x"] + box["width"] * (0.6 - k * 0.004), y)
    view.page.mouse.up()
    [last, *_] = strengths(view)
    assert last != 1

    def new_jobs() -> list[dict]:
        return [job for key, job in job_history(server).items() if key not in before]

    def strength_of(job: dict) -> float:
        [sent] = [node["inputs"] for node in job["prompt"][2].values() if node["class_type"] == NODE]
        return sent["strength_1"]

    wait_for(lambda: idle(server) and last in map(strength_of, new_jobs()))
    time.sleep(1)
    new = new_jobs()
    assert len(new) <= 2
    assert strength_of(new[-1]) == last
    view.page.wait_for_function("document.querySelector('.es-image')?.src.includes('/view?')")
    url = view.page.locator(".es-image").get_attribute("src")
    [image] = [out["images"] for out in new[-1]["outputs"].values() if "images" in out]
    assert image[0]["filename"] in url
    live(view).uncheck()
    assert view.errors == []


def test_live_cancels_its_own_job_and_no_other(server, view):
    foreign = Graph()
    foreign.save(foreign.sample(foreign.model(), foreign.edited(foreign.stock_text("a cat")), steps=150))
    open_graph(view, live_graph(steps=3000))
    before = set(job_history(server))
    live(view).check()
    wait_for(lambda: queued_job_ids(server, "running"))
    [own] = queued_job_ids(server, "running")
    strange = server.submit(foreign)
    slider(view, 0).focus()
    view.page.keyboard.press("ArrowLeft")
    wait_for(lambda: queued_job_ids(server, "running") == [strange])
    live(view).uncheck()
    assert server.wait(strange).ok
    # The canceled job does not stay in the history as an error.
    wait_for(lambda: idle(server) and set(job_history(server)) - before == {strange})
    assert own != strange
    assert view.errors == []


def test_live_cancels_its_pending_job_and_not_the_running_one(server, view):
    foreign = Graph()
    foreign.save(foreign.sample(foreign.model(), foreign.edited(foreign.stock_text("a dog")), steps=300))
    open_graph(view, live_graph())
    strange = server.submit(foreign)
    wait_for(lambda: json.loads(server.get("/queue"))["queue_running"])

    def waiting() -> list[str]:
        return queued_job_ids(server, "pending")

    live(view).check()
    wait_for(waiting)
    first = waiting()
    slider(view, 0).focus()
    view.page.keyboard.press("ArrowLeft")
    wait_for(lambda: waiting() and waiting() != first)
    assert len(first) == len(waiting()) == 1
    live(view).uncheck()
    wait_for(lambda: not waiting())
    assert server.wait(strange).ok
    assert not {*first} & set(job_history(server))
    assert view.errors == []


def test_live_continues_after_the_queue_was_cleared(server, view):
    foreign = Graph()
    foreign.save(foreign.sample(foreign.model(), foreign.edited(foreign.stock_text("a bird")), steps=100))
    open_graph(view, live_graph())
    strange = server.submit(foreign)
    wait_for(lambda: queued_job_ids(server, "running"))
    live(view).check()
    wait_for(lambda: queued_job_ids(server, "pending"))
    server.post("/queue", {"clear": True})
    before = set(job_history(server))
    slider(view, 0).focus()
    view.page.keyboard.press("ArrowLeft")
    wait_for(lambda: len(set(job_history(server)) - before - {strange}) == 1 and idle(server))
    live(view).uncheck()


def test_a_muted_node_is_reported(view):
    open_graph(view, live_graph())
    view.page.evaluate("type => { app.graph.findNodesByType(type)[0].mode = 2 }", NODE)
    view.page.locator(".es-sweep").click()
    view.page.wait_for_function("document.querySelector('[role=alert]')?.textContent.includes('muted or bypassed')")
    live(view).check()
    view.page.wait_for_timeout(600)
    assert "muted or bypassed" in view.page.locator("[role=alert]").inner_text()
    live(view).uncheck()


def test_live_shows_errors(server, view):
    open_graph(view, live_graph())
    view.set_widget("UNETLoader", "unet_name", "gone.safetensors")
    live(view).check()
    view.page.wait_for_function("document.querySelector('[role=alert]')?.textContent.includes('gone.safetensors')")
    live(view).uncheck()
    unsaved = {key: node for key, node in prompt_graph().items() if node["class_type"] != "TinyTestSaveLatent"}
    open_graph(view, unsaved)
    live(view).check()
    view.page.wait_for_function("document.querySelector('[role=alert]')?.textContent.includes('Nothing to run')")
    live(view).uncheck()


@pytest.mark.newer_frontend_too
def test_in_a_subgraph(server, view):
    open_graph(view, live_graph())
    before = set(job_history(server))
    move_into_subgraph(view)
    number(view, 1).fill("0.35")
    number(view, 1).press("Enter")
    live(view).check()
    wait_for(lambda: set(job_history(server)) - before and idle(server))
    [job] = [job for key, job in job_history(server).items() if key not in before]
    [(key, node)] = [item for item in job["prompt"][2].items() if item[1]["class_type"] == NODE]
    assert ":" in key
    assert node["inputs"]["strength_2"] == 0.35
    assert job["status"]["status_str"] == "success"
    view.page.wait_for_function("document.querySelector('.es-image')?.src.includes('/view?')")
    live(view).uncheck()
    assert view.errors == []


@pytest.mark.newer_frontend_too
def test_tokens_of_the_phrase_under_the_pointer(page):
    rows(page).nth(1).locator(".es-phrase").hover()
    tokens = page.page.locator(".es-tokens")
    page.page.wait_for_function("document.querySelector('.es-tokens').textContent.includes('t5xxl')")
    assert tokens.locator("div", has_text="t5xxl").locator("i").all_inner_texts() == [
        "▁make",
        "▁the",
        "▁wall",
        "▁golden",
    ]
    assert tokens.locator("div", has_text="clip_l").locator("i").last.inner_text() == "golden</w>"
    page.page.mouse.move(10, 10)
    assert tokens.inner_text() == ""


def test_a_number_being_typed_is_left_alone(page):
    number(page, 1).fill("0.3")
    page.set_widget(NODE, "highest", 3)  # triggers a refresh
    assert number(page, 1).input_value() == "0.3"
    number(page, 1).press("Enter")
    assert strengths(page) == [1, 0.3, 1]
    number(page, 1).fill("500")
    number(page, 1).press("Enter")
    assert number(page, 1).input_value() == "5"
    number(page, 1).fill("400")
    number(page, 1).press("Enter")
    assert number(page, 1).input_value() == "5"
    assert strengths(page) == [1, 5, 1]


def test_phrases_without_tokens_are_reported_while_typing(page):
    prompt_box(page).fill("make it night\n()")
    page.page.wait_for_function("document.querySelector('.es-error').textContent.includes('contains no text')")
    prompt_box(page).fill("make it night")
    page.page.wait_for_function("document.querySelector('.es-error').textContent === ''")


def test_the_wheel_zooms_where_nothing_scrolls(view):
    open_graph(view, prompt_graph("\n".join(f"edit number {k}" for k in range(40))))
    scale = "app.canvas.ds.scale"
    before = view.page.evaluate(scale)
    view.page.locator(".es-rows").hover()
    slider(view, 0).focus()  # Nodes 2.0 lets only what has the focus scroll
    view.page.mouse.wheel(0, 60)
    view.page.wait_for_timeout(400)
    assert view.page.locator(".es-rows").evaluate("rows => rows.scrollTop") > 0
    assert view.page.evaluate(scale) == before
    view.page.locator(".es-bar").first.hover()
    view.page.mouse.wheel(0, 60)
    view.page.wait_for_function(f"before => {scale} < before", arg=before)


@pytest.mark.newer_frontend_too
def test_previews_are_shown_during_a_run(server, view):
    open_graph(view, live_graph(steps=200))
    live(view).check()
    view.page.wait_for_function("document.querySelector('.es-image')?.src.startsWith('blob:')", timeout=60_000)
    width = view.page.locator(".es-progress").evaluate("bar => parseFloat(bar.style.width)")
    assert 0 < width < 100
    live(view).uncheck()
    wait_for(lambda: idle(server))
