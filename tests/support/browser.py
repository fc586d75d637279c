"""ComfyUI's page in a headless Chromium. As a program: exits with status 0 if a browser can be launched."""

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

VIEWPORT = (1600, 900)
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
CHANNELS = ("chrome", "msedge", None)  # None: playwright's own browser
LAUNCH_ARGS = (
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
    """An installed Chromium, Chrome or Edge, else the browser that playwright has downloaded."""
    installed = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    launch_options: list[dict[str, Any]] = [{"executable_path": installed}] if installed else []
    launch_options += [{"channel": channel} for channel in CHANNELS]
    with sync_playwright() as playwright:
        running = _launch(playwright.chromium, launch_options)
        try:
            yield running
        finally:
            running.close()


def write_settings(base: Path) -> None:
    """Write user settings: no first-run dialogs, an empty graph on start. To be called before a server starts."""
    file = base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(SETTINGS))


class ComfyPage:
    """A page with ComfyUI's frontend.

    vue: whether nodes are drawn as Nodes 2.0 instead of on the canvas.
    errors: messages of uncaught exceptions in the page.
    """

    def __init__(self, running: Browser, server: ComfyServer, vue: bool) -> None:
        self.page: Page = running.new_page(viewport={"width": VIEWPORT[0], "height": VIEWPORT[1]})
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.url)
        self.wait_until_ready()
        self.page.evaluate("vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", vue)

    def wait_until_ready(self) -> None:
        """Wait until the page can load graphs, after it was opened or reloaded."""
        self.page.wait_for_function(
            "window.app?.extensionManager && app.vueAppReady && app.graph && !document.querySelector('#splash-loader')",
            timeout=120_000,
        )

    def open(self, workflow: dict[str, Any]) -> None:
        """Load a workflow as saved by the frontend, and wait for all of its nodes."""
        self.leave_subgraph()
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_function("count => app.graph.nodes.length === count", arg=len(workflow["nodes"]))

    def leave_subgraph(self) -> None:
        """Show the root graph: the frontend loads a graph into the one that is shown."""
        self.page.evaluate("app.canvas.graph.isRootGraph || app.canvas.setGraph(app.canvas.graph.rootGraph)")

    def prompt(self) -> dict[str, dict[str, Any]]:
        """The graph in API format, as the page would queue it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        """Set a widget of the first node of this type and call its callback."""
        self.page.evaluate(
            """([type, name, value]) => {
                const widget = app.graph.findNodesByType(type)[0].widgets.find(widget => widget.name === name)
                widget.value = value
                widget.callback?.(value)
            }""",
            [node_type, name, value],
        )

    def saved_values(self, node_type: str) -> list[Any]:
        """The widgets_values of the first node of this type in the saved workflow."""
        return self.page.evaluate(
            "type => app.graph.serialize().nodes.find(node => node.type === type).widgets_values", node_type
        )

    def run(self) -> None:
        """Queue the graph with the page's Run button."""
        self.page.get_by_test_id("queue-button").click()

    def wait_until_shown(self, text: str) -> None:
        """Wait until a text box of any node contains `text`."""
        self.page.wait_for_function(
            "text => [...document.querySelectorAll('textarea')].some(box => box.value.includes(text))", arg=text
        )

    def close(self) -> None:
        self.page.close()


def _launch(chromium: Any, launch_options: Sequence[dict[str, Any]]) -> Browser:
    reasons = []
    for options in launch_options:
        try:
            return chromium.launch(args=LAUNCH_ARGS, **options)
        except Error as error:
            reasons.append(str(error).splitlines()[0])
    raise RuntimeError("The tests need a browser. Install Chromium, Chrome or Edge.\n" + "\n".join(reasons))


if __name__ == "__main__":
    try:
        with browser():
            pass
    except RuntimeError as error:
        sys.exit(str(error))
