"""The pack's settings, commands, translations and about badge in ComfyUI's page."""

from __future__ import annotations

import ast
import json
import re

import pytest
from conftest import REPO
from support.browser import ComfyPage
from support.slider_page import (
    NODE,
    idle,
    inputs,
    job_history,
    live,
    live_graph,
    number,
    open_graph,
    prompt_graph,
    rows,
    show,
    slider,
    strengths,
    wait_for,
)

LOCALES = REPO / "locales"


@pytest.fixture
def settings(view: ComfyPage):
    """A function that sets a setting of the page until the test ends."""
    before: dict[str, object] = {}

    def set_setting(name: str, value: object) -> None:
        value_before = view.page.evaluate("name => app.extensionManager.setting.get(name)", name)
        before.setdefault(name, value_before)
        view.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    yield set_setting
    for name, value in before.items():
        view.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])


def create_node(view: ComfyPage) -> None:
    view.page.evaluate(
        """type => {
            app.graph.clear()
            const node = LiteGraph.createNode(type)
            node.id = 100000 + Math.floor(performance.now()) // the page remembers values by id
            app.graph.add(node)
        }""",
        NODE,
    )
    show(view)


@pytest.mark.newer_frontend_too
def test_settings_are_the_defaults_of_new_nodes(view, settings):
    settings("EditSliders.Lowest", -1)
    settings("EditSliders.Highest", 3.5)
    settings("EditSliders.Live", True)
    create_node(view)
    assert slider(view, 0).get_attribute("min") == "-1"
    assert slider(view, 0).get_attribute("max") == "3.5"
    assert live(view).is_checked()
    open_graph(view, prompt_graph(lowest=-0.25, highest=1.25))
    assert (inputs(view)["lowest"], inputs(view)["highest"]) == (-0.25, 1.25)
    live(view).uncheck()
    assert view.errors == []


def start_live(server, view: ComfyPage) -> set[str]:
    """Turn live mode on and wait for its first run. Returns the ids of all jobs so far."""
    live(view).check()
    wait_for(lambda: idle(server))
    view.page.wait_for_timeout(1000)
    wait_for(lambda: idle(server))
    return set(job_history(server))


def drag_first_slider(view: ComfyPage, to: float) -> None:
    """Press the mouse button on the first slider and move it, without releasing it."""
    box = slider(view, 0).bounding_box()
    y = box["y"] + box["height"] / 2
    view.page.mouse.move(box["x"] + box["width"] * 0.6, y)
    view.page.mouse.down()
    view.page.mouse.move(box["x"] + box["width"] * to, y)


def finished_runs(server, before: set[str]) -> list[tuple[int, float]]:
    """Steps and strength_1 of the jobs that have ended since `before`."""
    done = []
    for key, job in job_history(server).items():
        if key not in before:
            graph = job["prompt"][2].values()
            [steps] = [node["inputs"]["steps"] for node in graph if node["class_type"] == "KSampler"]
            [strength] = [node["inputs"]["strength_1"] for node in graph if node["class_type"] == NODE]
            done.append((steps, strength))
    return done


@pytest.mark.newer_frontend_too
def test_fewer_steps_while_dragging_and_all_on_release(server, view, settings):
    settings("EditSliders.DragSteps", 1)
    open_graph(view, live_graph(steps=3))
    before = start_live(server, view)
    drag_first_slider(view, 0.3)
    view.page.wait_for_timeout(600)
    wait_for(lambda: finished_runs(server, before) and idle(server))
    strength = strengths(view)[0]
    assert finished_runs(server, before) == [(1, strength)]
    view.page.mouse.up()
    view.page.wait_for_timeout(600)
    wait_for(lambda: len(finished_runs(server, before)) == 2 and idle(server))
    assert finished_runs(server, before) == [(1, strength), (3, strength)]
    live(view).uncheck()


def test_release_queues_no_further_job(server, view):
    open_graph(view, live_graph(steps=2))
    before = start_live(server, view)
    drag_first_slider(view, 0.4)
    view.page.wait_for_timeout(600)
    wait_for(lambda: finished_runs(server, before) and idle(server))
    view.page.mouse.up()
    view.page.wait_for_timeout(1500)
    wait_for(lambda: idle(server))
    assert len(finished_runs(server, before)) == 1
    live(view).uncheck()


def test_a_live_run_waits_for_the_delay(server, view, settings):
    settings("EditSliders.Debounce", 3000)
    open_graph(view, live_graph())
    before = set(job_history(server))
    live(view).check()
    view.page.wait_for_timeout(1500)
    assert set(job_history(server)) == before
    assert idle(server)
    wait_for(lambda: set(job_history(server)) - before)
    live(view).uncheck()


@pytest.mark.newer_frontend_too
def test_keybindings_act_on_selected_nodes_or_on_all(server, view):
    open_graph(view, live_graph())
    number(view, 0).fill("0.2")
    number(view, 0).press("Enter")
    slider(view, 0).focus()
    view.page.keyboard.press("Alt+Shift+R")
    assert strengths(view) == [1, 1, 1]
    number(view, 0).fill("0.2")
    number(view, 0).press("Enter")
    view.page.evaluate("app.canvas.selectItems(app.graph.findNodesByType('KSampler'))")
    view.page.evaluate("app.extensionManager.command.execute('EditSliders.Reset')")
    assert strengths(view) == [1, 1, 1]
    view.page.evaluate("app.canvas.canvas.focus()")
    view.page.keyboard.press("Alt+Shift+L")
    assert live(view).is_checked()
    view.page.keyboard.press("Alt+Shift+L")
    assert not live(view).is_checked()
    wait_for(lambda: idle(server))
    view.page.keyboard.press("Alt+Shift+S")
    view.page.wait_for_function("document.querySelectorAll('.es-frame img').length === 7", timeout=60_000)
    assert view.errors == []


def test_only_the_selected_node_is_reset(view):
    open_graph(view, prompt_graph(strength_1=0.5))
    view.page.evaluate(
        """type => {
            const other = LiteGraph.createNode(type)
            app.graph.add(other)
            app.canvas.selectItems([other])
        }""",
        NODE,
    )
    view.page.evaluate("app.extensionManager.command.execute('EditSliders.Reset')")
    [first] = [node for node in view.prompt().values() if node["class_type"] == NODE and "clip" in node["inputs"]]
    assert first["inputs"]["strength_1"] == 0.5


@pytest.mark.newer_frontend_too
def test_the_about_badge_shows_the_version(view):
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)[1]
    view.page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    view.page.get_by_text("About", exact=True).first.click()
    view.page.get_by_text(f"Edit Sliders {version}").wait_for()
    view.page.reload()  # Escape does not close the dialog in every frontend
    view.wait_until_ready()


def test_commands_are_registered(view):
    commands = view.page.evaluate("app.extensionManager.command.commands.map(command => command.id)")
    assert {"EditSliders.ToggleLive", "EditSliders.Reset", "EditSliders.Sweep"} <= set(commands)


def test_the_page_in_chinese(view, settings):
    settings("Comfy.Locale", "zh")
    view.page.reload()
    view.wait_until_ready()
    open_graph(view, prompt_graph())
    assert "重置" in view.page.locator(".es-bar").first.inner_text()
    title = view.page.evaluate("type => app.graph.findNodesByType(type)[0].title", NODE)
    assert title == json.loads((LOCALES / "zh" / "nodeDefs.json").read_text())[NODE]["display_name"]
    settings("Comfy.Locale", "en")
    view.page.reload()
    view.wait_until_ready()
    open_graph(view, prompt_graph())
    assert "reset" in view.page.locator(".es-bar").first.inner_text()
    assert rows(view).count() == 2


@pytest.mark.newer_frontend_too
def test_options_have_labels_and_keep_their_values(view):
    open_graph(view, prompt_graph())
    label, value = view.page.evaluate(
        """type => {
            const widget = app.graph.findNodesByType(type)[0].widgets.find(widget => widget.name === 'mode')
            return [widget.options.getOptionLabel(widget.value), widget.value]
        }""",
        NODE,
    )
    assert (label, value) == ("one instruction per line", "one per line")
    assert inputs(view)["mode"] == "one per line"
    assert view.errors == []


def test_translations_are_complete(server):
    read = {file.relative_to(LOCALES).as_posix(): json.loads(file.read_text()) for file in LOCALES.rglob("*.json")}
    english, chinese = read["en/main.json"]["editSliders"], read["zh/main.json"]["editSliders"]
    assert list(english) == list(chinese)
    for name, text in english.items():
        assert sorted(re.findall(r"\{\d\}", text)) == sorted(re.findall(r"\{\d\}", chinese[name])), name
    code = "".join(file.read_text() for file in (REPO / "web").rglob("*js"))
    used = set(re.findall(r"\bt\('(\w+)'", code)) | {"sweepSlider", "secondSlider", "from", "to", "count"}
    assert used | {"format_webp", "format_strip", "format_grid"} == set(english)
    assert {f"EditSliders_{name}" for name in re.findall(r"command\('(\w+)'", code)} == set(read["zh/commands.json"])
    names = re.findall(r"(?:numeric|settingId)\('(\w+)'", code)
    assert {f"EditSliders_{name[0].upper()}{name[1:]}" for name in names} == set(read["zh/settings.json"])

    ours = {key: node for key, node in server.object_info().items() if key.startswith("EditSliders")}
    specs = [spec for node in ours.values() for kind in node["input"].values() for spec in kind.values()]
    options = {option for kind, *rest in specs if kind == "COMBO" for option in rest[0]["options"]}
    assert set(read["en/main.json"]["editSlidersOptions"]) <= set(read["zh/main.json"]["editSlidersOptions"]) <= options
    assert set(read["zh/nodeDefs.json"]) == set(ours)
    for key, texts in read["zh/nodeDefs.json"].items():
        known = {**ours[key]["input"].get("required", {}), **ours[key]["input"].get("optional", {})}
        assert set(texts["inputs"]) == set(known), key
        assert len(texts.get("outputs", {})) == len(ours[key]["output"]), key


def test_scripts_use_no_globals_of_the_page():
    for file in (REPO / "web").rglob("*js"):
        code = file.read_text()
        assert not re.search(r"\bwindow\b|globalThis|document\.(addEventListener|on\w+\s*=)", code), file.name


def test_nodes_that_return_a_text_have_the_flag_that_the_page_looks_for():
    """web/shared/text_output.mjs shows the text of ui.PreviewText on nodes with has_intermediate_output."""
    for file in (REPO / "nodes").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            source = ast.unparse(node)
            assert "PreviewText(" not in source or "has_intermediate_output=True" in source, source.splitlines()[0]
