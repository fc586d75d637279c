"""The curve of a Calibrated Strength in the real page, on the canvas and in Nodes 2.0."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Locator, expect
from support.browser import ComfyPage
from support.graphs import Graph
from support.slider_page import bring_into_sight
from test_calibration import BAD, CURVE
from test_sweep_metrics import grays, pictures, strengths

from slider_core.metrics.calibration import parse_calibration

NODE = "EditSlidersCalibratedStrength"
THREE = '{"positions": [0, 0.5, 1], "strengths": [0.2, 0.7, 1]}'
NO_CURVE = "No curve: the position is used as the strength."


def graph(g: Graph, curve: object, position: float = 1.0) -> Graph:
    g.add("PreviewAny", source=g.add(NODE, position=position, curve=curve, on=True))
    return g


def show(view: ComfyPage) -> None:
    bring_into_sight(view, NODE, view.page.locator(".es-curve"))


def opened(view: ComfyPage, g: Graph) -> None:
    view.leave_subgraph()
    view.page.evaluate("graph => app.loadApiJson(graph, 'test')", g)
    show(view)


def says(view: ComfyPage, text: str) -> None:
    """Wait for the picture in sight to say this to those who cannot see it."""
    expect(view.page.get_by_role("img", name=text, exact=True)).to_be_visible()


def points(view: ComfyPage) -> Locator:
    return view.page.locator(".es-point")


def keep(view: ComfyPage) -> Locator:
    return view.page.get_by_role("button", name="Keep this curve")


def place(part: Locator) -> tuple[float, float]:
    return float(part.get_attribute("cx")), float(part.get_attribute("cy"))


def tracker(view: ComfyPage, what: str) -> Any:
    return view.page.evaluate(f"app.extensionManager.workflow.activeWorkflow.changeTracker.{what}")


def inputs(view: ComfyPage) -> dict:
    [node] = [node for node in view.prompt().values() if node["class_type"] == NODE]
    return node["inputs"]


@pytest.mark.newer_frontend_too
def test_the_curve_of_the_text(view):
    opened(view, graph(Graph(), ""))
    says(view, NO_CURVE)
    assert view.page.locator(".es-unused .es-identity").count() == 1
    assert view.page.locator(".es-line, .es-point, .es-marker").count() == 0

    typed = view.page.locator("textarea").first
    typed.click()
    view.page.keyboard.insert_text(THREE)
    says(view, "Curve: 0 is strength 0.2, 0.5 is strength 0.7, 1 is strength 1. Now 1 is strength 1.")
    assert points(view).count() == 3
    view.set_widget(NODE, "position", 0.25)
    says(view, "Curve: 0 is strength 0.2, 0.5 is strength 0.7, 1 is strength 1. Now 0.25 is strength 0.45.")
    (first, middle), marker = map(place, points(view).all()[:2]), place(view.page.locator(".es-marker"))
    assert marker == pytest.approx(((first[0] + middle[0]) / 2, (first[1] + middle[1]) / 2), abs=0.1)
    assert first[0] < middle[0]
    assert first[1] > middle[1]
    view.set_widget(NODE, "position", 1.5)
    says(view, "Curve: 0 is strength 0.2, 0.5 is strength 0.7, 1 is strength 1. Now 1.5 is strength 1.4.")

    view.set_widget(NODE, "on", False)
    says(view, NO_CURVE)
    view.set_widget(NODE, "on", True)
    for text, _ in BAD:
        view.set_widget(NODE, "curve", text)
        assert view.page.locator(".es-curve-error").is_visible(), text
        assert points(view).count() == 0, text
    assert (
        view.page.locator(".es-curve-error").inner_text()
        == "The positions range from 0 to 0.9; expected a range that contains 0 and 1."
    )
    view.set_widget(NODE, "curve", CURVE)
    says(view, "Curve: 0 is strength 0.4, 1 is strength 1. Now 1.5 is strength 1.3.")
    assert view.saved_values(NODE) == [1.5, CURVE, True]
    assert inputs(view) == {"position": 1.5, "curve": CURVE, "on": True}

    tracker(view, "captureCanvasState()")
    view.set_widget(NODE, "curve", THREE)
    tracker(view, "captureCanvasState()")
    tracker(view, "undo()")
    show(view)
    says(view, "Curve: 0 is strength 0.4, 1 is strength 1. Now 1.5 is strength 1.3.")
    view.set_widget(NODE, "position", 0.5)
    says(view, "Curve: 0 is strength 0.4, 1 is strength 1. Now 0.5 is strength 0.7.")
    view.set_widget(NODE, "on", False)
    view.page.evaluate(
        """type => {
            const copy = app.graph.findNodesByType(type)[0].clone()
            copy.pos = [-4600, 0]
            app.graph.add(copy)
        }""",
        NODE,
    )
    expect(view.page.get_by_role("img", name=NO_CURVE, exact=True)).to_have_count(2)
    assert view.errors == []


@pytest.mark.newer_frontend_too
def test_a_linked_curve_is_drawn_after_a_run_and_kept(view):
    g = Graph()
    images, listed = pictures(g, *grays(0, 0, 10, 110, 210)), strengths(g, "0 .25 .5 .75 1")
    opened(view, graph(g, g.add("EditSlidersCalibrate", images=images, strengths=listed), 0.3))
    assert "comes from another node" in view.page.locator(".es-plot").inner_text()
    expect(keep(view)).to_be_hidden()

    view.run()
    expect(points(view).first).to_be_visible(timeout=60_000)
    saved = view.page.evaluate("JSON.stringify(app.graph.serialize())")
    assert "es-" not in saved
    picture = view.page.locator(".es-plot svg").get_attribute("aria-label")
    linked = inputs(view)["curve"]
    tracker(view, "captureCanvasState()")
    steps = tracker(view, "undoQueue.length")
    keep(view).click()
    expect(keep(view)).to_be_hidden()
    kept = inputs(view)["curve"]
    curve = parse_calibration(kept)
    assert curve.strengths == (0.25, 0.5, 0.75, 1)
    [strength] = curve.strength([0.3])
    assert picture.endswith(f"Now 0.3 is strength {round(strength, 3):g}.")  # not on a straight line between the points
    says(view, picture)

    assert tracker(view, "undoQueue.length") == steps + 1
    tracker(view, "undo()")
    show(view)
    says(view, picture)
    assert inputs(view)["curve"] == linked
    expect(keep(view)).to_be_visible()
    view.page.wait_for_timeout(1500)  # until nothing is drawn anew because of the undo
    view.page.evaluate(
        """type => {
            const [node] = app.graph.findNodesByType(type)
            const slot = node.inputs.findIndex(input => input.name === 'curve')
            app.graph.findNodesByType('EditSlidersCalibrate')[0].connect(2, node, slot)
        }""",
        NODE,
    )
    assert "comes from another node" in view.page.locator(".es-plot").inner_text()
    expect(keep(view)).to_be_hidden()
    assert view.errors == []
