"""How smoothly the Slider Prompt moves in the page, in a headless browser on this machine.

    python run.py benchmark [--repeats N]

With 49 sub-instructions: frames a second while a slider is dragged (a mouse move every frame), while nothing moves, and
tasks of more than 50 ms, as the browser's own tracing counts them; the longest task of typing a 50th.
On the canvas and in Nodes 2.0. Medians of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from playwright.sync_api import Browser  # noqa: E402
from support.browser import ComfyPage, browser, write_settings  # noqa: E402
from support.comfy_server import ComfyServer  # noqa: E402
from support.slider_page import opened, prompt_graph, slider, typed  # noqa: E402
from support.tiny_models import write_tiny_models  # noqa: E402

LINES = 50
MOVES = 120
LONG_MS = 50
COUNT_FRAMES = """() => {
    window.benchmark = { frames: 0, begun: performance.now(), on: true }
    const count = () => {
        window.benchmark.frames++
        if (window.benchmark.on) requestAnimationFrame(count)
    }
    requestAnimationFrame(count)
}"""
FRAMES_A_SECOND = """() => {
    window.benchmark.on = false
    return (1000 * window.benchmark.frames) / (performance.now() - window.benchmark.begun)
}"""


class Measured(NamedTuple):
    """frames a second at rest and while dragging, long tasks of the drag, longest task of typing in milliseconds"""

    rest: float
    drag: float
    long_tasks: float
    typing: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args, _ = parser.parse_known_args()  # the other benchmarks have more
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_tiny_models(base / "models")
        write_settings(base)
        packs = {"ComfyUI-EditSliders": ROOT, "tiny_loaders": ROOT / "tests" / "support" / "tiny_loaders"}
        with ComfyServer(Path(os.environ["COMFYUI_PATH"]), base, packs) as server, browser() as running:
            pages = {name: ComfyPage(running, server, vue) for name, vue in (("canvas", False), ("Nodes 2.0", True))}
            results = {name: [_measure(running, view) for _ in range(args.repeats)] for name, view in pages.items()}
    for name, repeats in results.items():
        rest, drag, long_tasks, typing = (statistics.median(values) for values in zip(*repeats))
        print(
            f"{name}: {drag:.1f} frames/s while dragging ({rest:.1f} at rest), "
            f"{long_tasks:.0f} tasks over {LONG_MS} ms in {MOVES} moves; longest task of typing a line: {typing:.0f} ms"
        )


def _measure(running: Browser, view: ComfyPage) -> Measured:
    opened(view, prompt_graph("\n".join(f"make thing number {k} older" for k in range(LINES - 1))))
    view.page.wait_for_timeout(2000)
    view.page.evaluate(COUNT_FRAMES)
    view.page.wait_for_timeout(2000)
    rest = view.page.evaluate(FRAMES_A_SECOND)

    box = slider(view, 3).bounding_box()
    assert box
    y = box["y"] + box["height"] / 2
    view.page.mouse.move(box["x"] + box["width"] * 0.6, y)
    view.page.mouse.down()
    running.start_tracing(page=view.page, categories=["toplevel", "disabled-by-default-devtools.timeline"])
    view.page.evaluate(COUNT_FRAMES)
    for k in range(MOVES):
        view.page.mouse.move(box["x"] + box["width"] * (0.6 - 0.4 * (k / MOVES)), y)
        view.page.evaluate("() => new Promise(requestAnimationFrame)")
    drag = view.page.evaluate(FRAMES_A_SECOND)
    long_tasks = len([task for task in _tasks(running.stop_tracing()) if task > LONG_MS])
    view.page.mouse.up()

    typed(view).focus()
    view.page.keyboard.press("Control+End")
    running.start_tracing(page=view.page, categories=["toplevel", "disabled-by-default-devtools.timeline"])
    view.page.keyboard.type("\nmake it night")
    view.page.wait_for_timeout(1000)
    return Measured(rest, drag, long_tasks, max(_tasks(running.stop_tracing())))


def _tasks(trace: bytes) -> list[float]:
    """Milliseconds of the tasks on the page's main thread."""
    events = json.loads(trace)["traceEvents"]
    mains = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["args"].get("name") == "CrRendererMain"}
    return [
        event["dur"] / 1000
        for event in events
        if event["name"] in ("RunTask", "ThreadControllerImpl::RunTask")
        and event.get("dur")
        and (event["pid"], event["tid"]) in mains
    ]


if __name__ == "__main__":
    main()
