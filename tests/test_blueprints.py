"""The subgraph blueprint: added from the node search, it is the graph of template slider_prompt, and it runs."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect
from support.browser import ComfyPage
from test_templates import only, template, without_upscaling

NAME = "Kontext Slider Edit"
OUTSIDE = ("LoadImage", "PreviewImage", "SaveImage")


def open_with_images(view: ComfyPage) -> None:
    """Add the blueprint to an empty graph from the node search, and connect an image and a preview to it."""
    view.open({"nodes": [], "links": [], "version": 0.4})
    view.page.mouse.dblclick(800, 450)
    view.page.locator("[role=combobox][aria-controls=results-list]").fill("kontext")
    expect(view.page.get_by_test_id("result-item").first).to_contain_text(NAME)
    view.page.keyboard.press("Enter")
    view.page.wait_for_function("app.graph.nodes[0]?.flags.ghost")  # the node follows the pointer until a click
    for _ in range(20):  # the page ignores clicks until the search has closed
        view.page.mouse.click(700, 400)
        view.page.wait_for_timeout(200)
        if not view.page.evaluate("app.graph.nodes[0].flags.ghost"):
            break
    assert not view.page.evaluate("app.graph.nodes[0].flags.ghost")
    view.page.evaluate(
        """() => {
            const [blueprint] = app.graph.nodes
            const [image, preview] = ['LoadImage', 'PreviewImage'].map(type => LiteGraph.createNode(type))
            app.graph.add(image)
            app.graph.add(preview)
            image.widgets.find(widget => widget.name === 'image').value = 'photo.png'
            image.connect(0, blueprint, 'image')
            blueprint.connect(0, preview, 'images')
        }"""
    )


def inputs_by_type(graph: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Class type -> inputs, of the nodes inside the subgraph; a link names the class type of its origin."""

    def resolved(value: Any) -> Any:
        return (graph[value[0]]["class_type"], value[1]) if isinstance(value, list) else value

    return {
        node["class_type"]: {name: resolved(value) for name, value in node["inputs"].items()}
        for node in graph.values()
        if node["class_type"] not in OUTSIDE
    }


@pytest.mark.newer_frontend_too
def test_the_blueprint_is_the_graph_of_its_template(server, view):
    view.open(template(server, "slider_prompt"))
    expected = view.prompt()
    open_with_images(view)
    graph = view.prompt()
    assert len(graph) == len(expected)
    assert inputs_by_type(graph) == inputs_by_type(expected)
    assert graph[only(graph, "PreviewImage")]["inputs"]["images"] == [only(graph, "VAEDecode"), 0]
    assert view.errors == []


@pytest.mark.newer_frontend_too
def test_the_blueprint_runs_with_the_values_set_on_its_node(server, view):
    open_with_images(view)
    view.page.evaluate(
        "values => Object.entries(values).forEach(([name, value]) => {"
        " app.graph.nodes[0].widgets.find(widget => widget.name === name).value = value })",
        {"unet_name": "tiny-kontext.safetensors", "vae_name": "taef1", "seed": 7, "steps": 1},
    )
    graph = without_upscaling(view.prompt())
    sampler = graph[only(graph, "KSampler")]["inputs"]
    assert (sampler["seed"], sampler["steps"]) == (7, 1)
    graph[only(graph, "DualCLIPLoader")] = {
        "class_type": "TinyTestTextEncoders",
        "inputs": {"clip_l": "tiny-clip-l.safetensors", "t5xxl": "tiny-t5xxl.safetensors"},
    }
    result = server.run(graph)
    assert result.ok, result.error
    assert len(result.images(only(graph, "PreviewImage"))) == 1
    assert view.errors == []
