"""What the pack adds to ComfyUI's page around its nodes: settings, commands, languages, the about badge."""

from __future__ import annotations

import json
import re

import pytest
from conftest import REPO
from support.browser import ComfyPage
from support.slider_page import (
    NODE,
    idle,
    inputs,
    jobs_of,
    live,
    live_graph,
    number,
    opened,
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
    """Sets settings of the page, until the test ends."""
    before: dict[str, object] = {}

    def choose(name: str, value: object) -> None:
        found = view.page.evaluate("name => app.extensionManager.setting.get(name)", name)
        before.setdefault(name, found)
        view.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    yield choose
    for name, value in before.items():
        view.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])


def new_node(view: ComfyPage) -> None:
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
def test_new_nodes_begin_as_the_settings_say(view, settings):
    settings("EditSliders.Lowest", -1)
    settings("EditSliders.Highest", 3.5)
    settings("EditSliders.Live", True)
    new_node(view)
    assert slider(view, 0).get_attribute("min") == "-1"
    assert slider(view, 0).get_attribute("max") == "3.5"
    assert live(view).is_checked()
    opened(view, prompt_graph(lowest=-0.25, highest=1.25))
    assert (inputs(view)["lowest"], inputs(view)["highest"]) == (-0.25, 1.25)
    live(view).uncheck()
    assert view.errors == []


def live_and_idle(server, view: ComfyPage) -> set[str]:
    """Switch live on and let its first run end; the jobs so far."""
    live(view).check()
    wait_for(lambda: idle(server))
    view.page.wait_for_timeout(1000)
    wait_for(lambda: idle(server))
    return set(jobs_of(server))


def dragged(view: ComfyPage, to: float) -> None:
    """Press the mouse on the first slider and move it; it stays pressed."""
    box = slider(view, 0).bounding_box()
    y = box["y"] + box["height"] / 2
    view.page.mouse.move(box["x"] + box["width"] * 0.6, y)
    view.page.mouse.down()
    view.page.mouse.move(box["x"] + box["width"] * to, y)


def sampled(server, before: set[str]) -> list[tuple[int, float]]:
    """Steps and strength of the jobs that have ended since."""
    done = []
    for key, job in jobs_of(server).items():
        if key not in before:
            graph = job["prompt"][2].values()
            [steps] = [node["inputs"]["steps"] for node in graph if node["class_type"] == "KSampler"]
            [strength] = [node["inputs"]["strength_1"] for node in graph if node["class_type"] == NODE]
            done.append((steps, strength))
    return done


@pytest.mark.newer_frontend_too
def test_few_steps_while_dragging_and_all_on_release(server, view, settings):
    settings("EditSliders.DragSteps", 1)
    opened(view, live_graph(steps=3))
    before = live_and_idle(server, view)
    dragged(view, 0.3)
    view.page.wait_for_timeout(600)
    wait_for(lambda: sampled(server, before) and idle(server))
    strength = strengths(view)[0]
    assert sampled(server, before) == [(1, strength)]
    view.page.mouse.up()
    view.page.wait_for_timeout(600)
    wait_for(lambda: len(sampled(server, before)) == 2 and idle(server))
    assert sampled(server, before) == [(1, strength), (3, strength)]
    live(view).uncheck()


def test_letting_go_queues_nothing_else(server, view):
    opened(view, live_graph(steps=2))
    before = live_and_idle(server, view)
    dragged(view, 0.4)
    view.page.wait_for_timeout(600)
    wait_for(lambda: sampled(server, before) and idle(server))
    view.page.mouse.up()
    view.page.wait_for_timeout(1500)
    wait_for(lambda: idle(server))
    assert len(sampled(server, before)) == 1
    live(view).uncheck()


def test_a_long_pause_keeps_a_change_waiting(server, view, settings):
    settings("EditSliders.Debounce", 3000)
    opened(view, live_graph())
    before = set(jobs_of(server))
    live(view).check()
    view.page.wait_for_timeout(1500)
    assert set(jobs_of(server)) == before
    assert idle(server)
    wait_for(lambda: set(jobs_of(server)) - before)
    live(view).uncheck()


@pytest.mark.newer_frontend_too
def test_keys_for_the_chosen_nodes_or_for_all(server, view):
    opened(view, live_graph())
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


def test_only_the_chosen_node_is_reset(view):
    opened(view, prompt_graph(strength_1=0.5))
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
def test_the_about_badge_tells_the_version(view):
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)[1]
    view.page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    view.page.get_by_text("About", exact=True).first.click()
    view.page.get_by_text(f"Edit Sliders {version}").wait_for()
    view.page.reload()  # Escape does not close the dialog in every frontend
    view.wait_until_ready()


def test_every_setting_and_command_is_in_the_menus(view):
    known = view.page.evaluate("app.extensionManager.command.commands.map(command => command.id)")
    assert {"EditSliders.ToggleLive", "EditSliders.Reset", "EditSliders.Sweep"} <= set(known)


def test_the_page_in_chinese(view, settings):
    settings("Comfy.Locale", "zh")
    view.page.reload()
    view.wait_until_ready()
    opened(view, prompt_graph())
    assert "重置" in view.page.locator(".es-bar").first.inner_text()
    title = view.page.evaluate("type => app.graph.findNodesByType(type)[0].title", NODE)
    assert title == json.loads((LOCALES / "zh" / "nodeDefs.json").read_text())[NODE]["display_name"]
    settings("Comfy.Locale", "en")
    view.page.reload()
    view.wait_until_ready()
    opened(view, prompt_graph())
    assert "reset" in view.page.locator(".es-bar").first.inner_text()
    assert rows(view).count() == 2


def test_the_languages_are_complete(server):
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
    assert set(read["zh/nodeDefs.json"]) == set(ours)
    for key, texts in read["zh/nodeDefs.json"].items():
        known = {**ours[key]["input"].get("required", {}), **ours[key]["input"].get("optional", {})}
        assert set(texts["inputs"]) == set(known), key
        assert len(texts.get("outputs", {})) == len(ours[key]["output"]), key


def test_the_page_keeps_to_itself():
    for file in (REPO / "web").rglob("*js"):
        code = file.read_text()
        assert not re.search(r"\bwindow\b|globalThis|document\.(addEventListener|on\w+\s*=)", code), file.name
