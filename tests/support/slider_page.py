"""Graphs with an Edit Strength Sliders node, and locators of its elements in the page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Locator

from .browser import ComfyPage
from .comfy_server import ComfyServer
from .graphs import Graph

NODE = "EditSlidersSliderPrompt"
TWO_INSTRUCTIONS = "make the cat older\nmake the wall (golden:1.2)"


def prompt_graph(text: str = TWO_INSTRUCTIONS, **strengths: object) -> Graph:
    """An Edit Strength Sliders node and a sampler, in API format."""
    g = Graph()
    defaults = {f"strength_{k}": 1.0 for k in range(1, 51)}  # otherwise the page keeps the values of the graph before
    inputs: dict[str, Any] = {
        "mode": "one per line",
        "pad_to_512": True,
        "lowest": -0.5,
        "highest": 2.0,
        **defaults,
        **strengths,
    }
    conditioning = g.add(NODE, clip=g.clip(), text=text, **inputs)
    g.save(g.sample(g.stlora(g.model()), g.edited(conditioning), steps=1))
    return g


def open_graph(view: ComfyPage, graph: Graph) -> None:
    view.leave_subgraph()
    view.page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    show(view)


def show(view: ComfyPage) -> None:
    scroll_into_view(view, NODE, rows(view))


def scroll_into_view(view: ComfyPage, node_type: str, element: Locator) -> None:
    """Move the node to where the page shows all of it; repeatedly, since the page moves the view after loading."""
    for _ in range(10):
        _center(view, node_type)
        view.page.wait_for_timeout(400)
        if element.first.is_visible():
            return
    element.first.wait_for()


def _center(view: ComfyPage, node_type: str) -> None:
    view.page.evaluate(
        """type => {
            const node = app.canvas.graph.nodes.find(node => node.type === type)
            node.pos = [-5000, 0] // away from the others
            app.canvas.ds.scale = 1
            app.canvas.ds.offset = [5400, 160]
            app.canvas.setDirty(true, true)
        }""",
        node_type,
    )


def rows(view: ComfyPage) -> Locator:
    return view.page.locator(".es-row")


def slider(view: ComfyPage, k: int) -> Locator:
    return rows(view).nth(k).locator("input[type=range]")


def number(view: ComfyPage, k: int) -> Locator:
    return rows(view).nth(k).locator("input[type=number]")


def prompt_box(view: ComfyPage) -> Locator:
    return view.page.locator(".es-text textarea")


def inputs(view: ComfyPage) -> dict[str, Any]:
    [node] = [node for node in view.prompt().values() if node["class_type"] == NODE]
    return node["inputs"]


def strengths(view: ComfyPage, count: int = 3) -> list[float]:
    return [inputs(view)[f"strength_{k}"] for k in range(1, count + 1)]


def phrases(view: ComfyPage) -> list[str]:
    return rows(view).locator(".es-phrase").all_inner_texts()


def live(view: ComfyPage) -> Locator:
    return view.page.locator(".es-bar label", has_text="live").locator("input")


def live_graph(steps: int = 1) -> Graph:
    g = prompt_graph()
    [sampler] = [key for key, node in g.items() if node["class_type"] == "KSampler"]
    g[sampler]["inputs"]["steps"] = steps
    vae = g.add("VAELoader", vae_name="taef1")
    g.add("PreviewImage", images=g.add("VAEDecode", samples=[sampler, 0], vae=vae))
    return g


def job_history(server: ComfyServer) -> dict[str, Any]:
    return json.loads(server.get("/history"))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def idle(server: ComfyServer) -> bool:
    queue = json.loads(server.get("/queue"))
    return not queue["queue_running"] and not queue["queue_pending"]


def queued_job_ids(server: ComfyServer, status: str) -> list[str]:
    """Ids of the jobs with this status: 'running' or 'pending'."""
    return [job[1] for job in json.loads(server.get("/queue"))[f"queue_{status}"]]


def move_into_subgraph(view: ComfyPage) -> None:
    """Convert the Edit Strength Sliders node into a subgraph and open the subgraph."""
    view.page.evaluate(
        """type => {
            const outer = app.graph.convertToSubgraph(new Set(app.graph.findNodesByType(type)))
            app.canvas.openSubgraph(outer.node.subgraph, outer.node)
        }""",
        NODE,
    )
    view.page.wait_for_function("type => app.canvas.graph.nodes.some(node => node.type === type)", arg=NODE)
    show(view)
