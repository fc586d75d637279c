"""ComfyUI's page in a real, headless Chromium. As a program: exit status 0 if there is one to be had."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

from .comfy_server import ComfyServer

SIZE = (1600, 900)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
CHANNELS = ("chrome", "msedge", None)  # None is playwright's own browser
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
}


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium, Chrome or Edge of this machine, else the one that playwright has downloaded."""
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    ways: list[dict[str, Any]] = [{"executable_path": installed}] if installed else []
    ways += [{"channel": channel} for channel in CHANNELS]
    with sync_playwright() as playwright:
        running = _launch(playwright.chromium, ways)
        try:
            yield running
        finally:
            running.close()


def write_settings(base: Path) -> None:
    """Before a server starts: no first-run dialog, every page starts with an empty graph."""
    file = base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(SETTINGS))


class ComfyPage:
    """A page that shows ComfyUI's frontend.

    vue: Nodes 2.0 instead of the canvas.
    errors: what went wrong in the page by itself, such as an exception nobody caught.
    """

    def __init__(self, running: Browser, server: ComfyServer, vue: bool) -> None:
        self.page: Page = running.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.url)
        self.wait_until_ready()
        self.page.evaluate("vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue)

    def wait_until_ready(self) -> None:
        """Wait until the page, opened or loaded again, can show graphs."""
        self.page.wait_for_function(
            "window.app?.extensionManager && app.vueAppReady && app.graph && !document.querySelector('#splash-loader')",
            timeout=120_000,
        )

    def open(self, workflow: dict[str, Any]) -> None:
        """Show a workflow as saved by the frontend, in full."""
        self.leave_subgraph()
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))

    def leave_subgraph(self) -> None:
        """Show the outermost graph: the frontend loads a graph into the one that is shown."""
        self.page.evaluate("app.canvas.graph.isRootGraph || app.canvas.setGraph(app.canvas.graph.rootGraph)")

    def prompt(self) -> dict[str, dict[str, Any]]:
        """The graph as the page would queue it, in API format."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        """Set a widget of the only node of this type, as if by hand."""
        self.page.evaluate(
            """([type, name, value]) => {
                const widget = app.graph.findNodesByType(type)[0].widgets.find(widget => widget.name === name)
                widget.value = value
                widget.callback?.(value)
            }""",
            [node_type, name, value],
        )

    def saved_values(self, node_type: str) -> list[Any]:
        """widgets_values of the only node of this type, as a saved workflow has them."""
        return self.page.evaluate(
            "type => app.graph.serialize().nodes.find(node => node.type === type).widgets_values", node_type
        )

    def run(self) -> None:
        """Queue the graph by the page's Run button."""
        self.page.get_by_test_id("queue-button").click()

    def wait_until_shown(self, text: str) -> None:
        """Wait for a text box of some node to hold `text`."""
        self.page.wait_for_function(
            "text => [...document.querySelectorAll('textarea')].some(box => box.value.includes(text))", arg=text
        )

    def close(self) -> None:
        self.page.close()


def _launch(chromium: Any, ways: Sequence[dict[str, Any]]) -> Browser:
    reasons = []
    for way in ways:
        try:
            return chromium.launch(args=QUIET, **way)
        except Error as error:
            reasons.append(str(error).splitlines()[0])
    raise RuntimeError("No browser for the tests: install Chromium, Chrome or Edge.\n" + "\n".join(reasons))


if __name__ == "__main__":
    try:
        with browser():
            pass
    except RuntimeError as error:
        sys.exit(str(error))
