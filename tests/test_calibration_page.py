"""The curve of a Calibrated Strength node in the page, on the canvas and in Nodes 2.0."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Locator, expect
from support.browser import ComfyPage
from support.graphs import Graph
from support.slider_page import scroll_into_view
from test_calibration import CURVE, INVALID_CURVES
from test_sweep_metrics import gray_colors, image_batch, strength_list

from slider_core.metrics.calibration import parse_calibration

NODE = "EditSlidersCalibratedStrength"
THREE = '{"positions": [0, 0.5, 1], "strengths": [0.2, 0.7, 1]}'
NO_CURVE = "No curve: the position is used as the strength."


def graph(g: Graph, curve: object, position: float = 1.0) -> Graph:
    g.add("PreviewAny", source=g.add(NODE, position=position, curve=curve, on=True))
    return g


def show(view: ComfyPage) -> None:
    scroll_into_view(view, NODE, view.page.locator(".es-curve"))


def open_graph(view: ComfyPage, g: Graph) -> None:
    view.leave_subgraph()
    view.page.evaluate("graph => app.loadApiJson(graph, 'test')", g)
    show(view)


def expect_description(view: ComfyPage, text: str) -> None:
    """Wait until the drawing has this accessible name."""
    expect(view.page.get_by_role("img", name=text, exact=True)).to_be_visible()


def points(view: ComfyPage) -> Locator:
    return view.page.locator(".es-point")


def keep_button(view: ComfyPage) -> Locator:
    return view.page.get_by_role("button", name="Keep this curve")


def center(circle: Locator) -> tuple[float, float]:
    return float(circle.get_attribute("cx")), float(circle.get_attribute("cy"))


def change_tracker(view: ComfyPage, call: str) -> Any:
    return view.page.evaluate(f"app.extensionManager.workflow.activeWorkflow.changeTracker.{call}")


def inputs(view: ComfyPage) -> dict:
    [node] = [node for node in view.prompt().values() if node["class_type"] == NODE]
    return node["inputs"]


@pytest.mark.newer_frontend_too
def test_the_curve_of_the_text(view):
    open_graph(view, graph(Graph(), ""))
    expect_description(view, NO_CURVE)
    assert view.page.locator(".es-unused .es-identity").count() == 1
    assert view.page.locator(".es-line, .es-point, .es-marker").count() == 0

    curve_box = view.page.locator("textarea").first
    curve_box.click()
    view.page.keyboard.insert_text(THREE)
    expect_description(view, "Curve: 0 is strength 0.2, 0.5 is strength 0.7, 1 is strength 1. Now 1 is strength 1.")
    assert points(view).count() == 3
    view.set_widget(NODE, "position", 0.25)
    expect_description(
        view, "Curve: 0 is strength 0.2, 0.5 is strength 0.7, 1 is strength 1. Now 0.25 is strength 0.45."
    )
    (first, middle), marker = map(center, points(view).all()[:2]), center(view.page.locator(".es-marker"))
    assert marker == pytest.approx(((first[0] + middle[0]) / 2, (first[1] + middle[1]) / 2), abs=0.1)
    assert first[0] < middle[0]
    assert first[1] > middle[1]
    view.set_widget(NODE, "position", 1.5)
    expect_description(view, "Curve: 0 is strength 0.2, 0.5 is strength 0.7, 1 is strength 1. Now 1.5 is strength 1.4.")

    view.set_widget(NODE, "on", False)
    expect_description(view, NO_CURVE)
    view.set_widget(NODE, "on", True)
    for text, _ in INVALID_CURVES:
        view.set_widget(NODE, "curve", text)
        assert view.page.locator(".es-curve-error").is_visible(), text
        assert points(view).count() == 0, text
    assert (
        view.page.locator(".es-curve-error").inner_text()
        == "The positions range from 0 to 0.9; expected a range that contains 0 and 1."
    )
    view.set_widget(NODE, "curve", CURVE)
    expect_description(view, "Curve: 0 is strength 0.4, 1 is strength 1. Now 1.5 is strength 1.3.")
    assert view.saved_values(NODE) == [1.5, CURVE, True]
    assert inputs(view) == {"position": 1.5, "curve": CURVE, "on": True}

    change_tracker(view, "captureCanvasState()")
    view.set_widget(NODE, "curve", THREE)
    change_tracker(view, "captureCanvasState()")
    change_tracker(view, "undo()")
    show(view)
    expect_description(view, "Curve: 0 is strength 0.4, 1 is strength 1. Now 1.5 is strength 1.3.")
    view.set_widget(NODE, "position", 0.5)
    expect_description(view, "Curve: 0 is strength 0.4, 1 is strength 1. Now 0.5 is strength 0.7.")
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
    images, strengths = image_batch(g, *gray_colors(0, 0, 10, 110, 210)), strength_list(g, "0 .25 .5 .75 1")
    open_graph(view, graph(g, g.add("EditSlidersCalibrate", images=images, strengths=strengths), 0.3))
    assert "comes from another node" in view.page.locator(".es-plot").inner_text()
    expect(keep_button(view)).to_be_hidden()

    view.run()
    expect(points(view).first).to_be_visible(timeout=60_000)
    saved = view.page.evaluate("JSON.stringify(app.graph.serialize())")
    assert "es-" not in saved
    description = view.page.locator(".es-plot svg").get_attribute("aria-label")
    linked = inputs(view)["curve"]
    change_tracker(view, "captureCanvasState()")
    steps = change_tracker(view, "undoQueue.length")
    keep_button(view).click()
    expect(keep_button(view)).to_be_hidden()
    kept = inputs(view)["curve"]
    curve = parse_calibration(kept)
    assert curve.strengths == (0.25, 0.5, 0.75, 1)
    [strength] = curve.strengths_at([0.3])
    # The drawn curve is not the straight line between the points.
    assert description.endswith(f"Now 0.3 is strength {round(strength, 3):g}.")
    expect_description(view, description)

    assert change_tracker(view, "undoQueue.length") == steps + 1
    change_tracker(view, "undo()")
    show(view)
    expect_description(view, description)
    assert inputs(view)["curve"] == linked
    expect(keep_button(view)).to_be_visible()
    view.page.wait_for_timeout(1500)  # until the redraws after the undo have ended
    view.page.evaluate(
        """type => {
            const [node] = app.graph.findNodesByType(type)
            const slot = node.inputs.findIndex(input => input.name === 'curve')
            app.graph.findNodesByType('EditSlidersCalibrate')[0].connect(2, node, slot)
        }""",
        NODE,
    )
    assert "comes from another node" in view.page.locator(".es-plot").inner_text()
    expect(keep_button(view)).to_be_hidden()
    assert view.errors == []
