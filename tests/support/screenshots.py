"""Screenshots of the page for README, help pages and templates, and their comparison."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

from .browser import ComfyPage, write_settings
from .comfy_server import ComfyServer

REPO = Path(__file__).resolve().parents[2]
WORKFLOWS = REPO / "workflows"
DOCS = REPO / "web" / "docs" / "pictures"
OVERVIEW = DOCS / "two_sliders.jpg"
FILMSTRIP = DOCS / "filmstrip.jpg"
QUALITY = 86
CORNER = (120, 120)  # of the screenshot in the page, right of and below the frontend's own controls
MARGIN = 24
THUMBNAIL = 512
OVERVIEW_WIDTH = 1800
SHOWN_NODES = {  # node types shown on a template's thumbnail
    "calibrated_slider": ("EditSlidersCalibrate", "EditSlidersCalibratedStrength"),
    "consistent_style": ("EditSlidersStackPrompts",),
    "incremental_editing": ("EditSlidersInjectVitalLayers", "EditSlidersStackPrompts"),
    "layer_analysis": ("EditSlidersFindVitalLayers",),
    "parallel_edit": ("EditSlidersInjectVitalLayers", "EditSlidersStackPrompts"),
    "photograph_edit": ("EditSlidersInvertPhotograph", "EditSlidersEditFromTrajectory"),
    "remembered_source": ("EditSlidersRememberSource", "EditSlidersInjectRememberedSource"),
    "single_slider": ("EditSlidersApplyGSTLoRA", "EditSlidersEncodeSubInstructions"),
    "slider_prompt": ("EditSlidersSliderPrompt",),
    "two_sub_prompt_sliders": ("EditSlidersEncodeSubInstructions", "EditSlidersSubInstructionStrengths"),
    "strength_projector": ("EditSlidersEncodeSubInstructions", "EditSlidersProjectorStrength"),
    "strength_sweep": ("EditSlidersStrengthRange", "EditSlidersSubInstructionStrengths"),
    "text_editing": ("EditSlidersStackPrompts",),
    "without_adapter": ("EditSlidersPromptDifference",),
}
BOUNDS = """types => {
    const nodes = app.graph.nodes.filter(node => !types.length || types.includes(node.type))
    return [
        Math.min(...nodes.map(node => node.pos[0])),
        Math.min(...nodes.map(node => node.pos[1])) - LiteGraph.NODE_TITLE_HEIGHT,
        Math.max(...nodes.map(node => node.pos[0] + node.size[0])),
        Math.max(...nodes.map(node => node.pos[1] + node.size[1])),
    ]
}"""
LOOK_AT = """([x, y, scale, left, top]) => {
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [left / scale - x, top / scale - y]
    app.canvas.setDirty(true, true)
}"""


def take_screenshots(comfyui: Path, base: Path, chromium: Browser) -> Iterator[tuple[Path, Image.Image]]:
    """Each image file of the templates and the README with a new screenshot; `base` is the server's base directory."""
    workflows = {name: json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")) for name in SHOWN_NODES}
    write_settings(base)
    for workflow in workflows.values():
        _create_model_files(workflow, base / "models")
    with ComfyServer(comfyui, base, {"ComfyUI-EditSliders": REPO}) as server:
        server.put_input("example.png", Image.open(REPO / "demo" / "photo.jpg"))
        view = ComfyPage(chromium, server, vue=True)
        view.page.set_viewport_size({"width": 2400, "height": 1400})
        for name, workflow in workflows.items():
            view.open(workflow)
            yield WORKFLOWS / f"{name}.jpg", screenshot_of(view, SHOWN_NODES[name], THUMBNAIL, square=True)
        view.open(workflows["slider_prompt"])
        yield OVERVIEW, screenshot_of(view, (), OVERVIEW_WIDTH)
        view.close()


def look_alike(a: Image.Image, b: Image.Image) -> bool:
    """Whether two images show the same, apart from fonts and small differences in layout."""
    thumbnails = [image.convert("L").resize((32, 32)) for image in (a, b)]
    difference = sum(abs(p - q) for p, q in zip(*(image.tobytes() for image in thumbnails))) / 32**2
    return abs(a.width / a.height - b.width / b.height) < 0.1 and difference < 10


def screenshot_of(view: ComfyPage, types: tuple[str, ...], width: int, square: bool = False) -> Image.Image:
    """A screenshot `width` pixels wide of the nodes of these types, or of all nodes; a square one on request."""
    left, top, right, bottom = view.page.evaluate(BOUNDS, types)
    across, down = right - left + 2 * MARGIN, bottom - top + 2 * MARGIN
    if square:
        side = max(across, down)
        left, top, across, down = left - (side - across) / 2, top - (side - down) / 2, side, side
    scale = width / across
    view.page.evaluate(LOOK_AT, [left - MARGIN, top - MARGIN, scale, *CORNER])
    view.page.wait_for_timeout(2000)
    png = view.page.screenshot(clip={"x": CORNER[0], "y": CORNER[1], "width": width, "height": down * scale})
    return Image.open(io.BytesIO(png)).convert("RGB")


def _create_model_files(workflow: dict, models: Path) -> None:
    """Create an empty file for each model of the template; the frontend would report missing ones."""
    for node in workflow["nodes"]:
        files = [(file["directory"], file["name"]) for file in node["properties"].get("models", ())]
        if node["type"] in ("EditSlidersLoadAdapter", "EditSlidersLoadProjector"):
            files = [("loras", name) for name in node["widgets_values"]]
        for folder, name in files:
            (models / folder).mkdir(parents=True, exist_ok=True)
            (models / folder / name).touch()
