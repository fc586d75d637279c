"""Smoothness of Edit Strength Sliders in the page, in a headless browser on this machine.

    python run.py benchmark [--repeats N]

With 49 instructions: frames per second while a slider is dragged (one mouse move per frame) and at rest; the number of
tasks longer than 50 ms during the drag, from the browser's own trace; the longest task while a 50th line is typed.
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
from support.slider_page import open_graph, prompt_box, prompt_graph, slider  # noqa: E402
from support.tiny_models import write_tiny_models  # noqa: E402

LINES = 50
MOVES = 120
LONG_MS = 50
COUNT_FRAMES = """() => {
    window.benchmark = { frames: 0, start: performance.now(), running: true }
    const count = () => {
        window.benchmark.frames++
        if (window.benchmark.running) requestAnimationFrame(count)
    }
    requestAnimationFrame(count)
}"""
FRAMES_PER_SECOND = """() => {
    window.benchmark.running = false
    return (1000 * window.benchmark.frames) / (performance.now() - window.benchmark.start)
}"""


class Measurement(NamedTuple):
    """Frames per second at rest and while dragging, number of long tasks of the drag, longest task of typing in ms."""

    rest: float
    drag: float
    long_tasks: float
    typing: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args, _ = parser.parse_known_args()  # ignores the options of the other benchmarks
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
            f"{long_tasks:.0f} tasks over {LONG_MS} ms in {MOVES} moves; "
            f"longest task while typing a line: {typing:.0f} ms"
        )


def _measure(running: Browser, view: ComfyPage) -> Measurement:
    open_graph(view, prompt_graph("\n".join(f"make thing number {k} older" for k in range(LINES - 1))))
    view.page.wait_for_timeout(2000)
    view.page.evaluate(COUNT_FRAMES)
    view.page.wait_for_timeout(2000)
    rest = view.page.evaluate(FRAMES_PER_SECOND)

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
    drag = view.page.evaluate(FRAMES_PER_SECOND)
    long_tasks = len([task for task in _task_durations(running.stop_tracing()) if task > LONG_MS])
    view.page.mouse.up()

    prompt_box(view).focus()
    view.page.keyboard.press("Control+End")
    running.start_tracing(page=view.page, categories=["toplevel", "disabled-by-default-devtools.timeline"])
    view.page.keyboard.type("\nmake it night")
    view.page.wait_for_timeout(1000)
    return Measurement(rest, drag, long_tasks, max(_task_durations(running.stop_tracing())))


def _task_durations(trace: bytes) -> list[float]:
    """Durations in milliseconds of the tasks on the page's main thread."""
    events = json.loads(trace)["traceEvents"]
    main_threads = {
        (e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["args"].get("name") == "CrRendererMain"
    }
    return [
        event["dur"] / 1000
        for event in events
        if event["name"] in ("RunTask", "ThreadControllerImpl::RunTask")
        and event.get("dur")
        and (event["pid"], event["tid"]) in main_threads
    ]


if __name__ == "__main__":
    main()
