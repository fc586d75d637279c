"""The pictures of README, help pages and templates, as the frontend shows the nodes."""

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
CORNER = (120, 120)  # of the picture in the page: nothing of the frontend lies over it from here on
MARGIN = 24
THUMBNAIL = 512
OVERVIEW_WIDTH = 1800
SUBJECTS = {  # the nodes that a thumbnail is about
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


def drawn(comfyui: Path, base: Path, running: Browser) -> Iterator[tuple[Path, Image.Image]]:
    """The templates' thumbnails and the README's picture with their places; `base` becomes the folder of a server."""
    workflows = {name: json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")) for name in SUBJECTS}
    write_settings(base)
    for workflow in workflows.values():
        _pretend_files(workflow, base / "models")
    with ComfyServer(comfyui, base, {"ComfyUI-EditSliders": REPO}) as server:
        server.put_input("example.png", Image.open(REPO / "demo" / "photo.jpg"))
        view = ComfyPage(running, server, vue=True)
        view.page.set_viewport_size({"width": 2400, "height": 1400})
        for name, workflow in workflows.items():
            view.open(workflow)
            yield WORKFLOWS / f"{name}.jpg", picture_of(view, SUBJECTS[name], THUMBNAIL, square=True)
        view.open(workflows["slider_prompt"])
        yield OVERVIEW, picture_of(view, (), OVERVIEW_WIDTH)
        view.close()


def alike(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures show the same but for fonts."""
    small = [picture.convert("L").resize((32, 32)) for picture in (one, other)]
    apart = sum(abs(a - b) for a, b in zip(*(picture.tobytes() for picture in small))) / 32**2
    return abs(one.width / one.height - other.width / other.height) < 0.1 and apart < 10


def picture_of(view: ComfyPage, types: tuple[str, ...], width: int, square: bool = False) -> Image.Image:
    """The nodes of these types, or all, and nothing else of the page."""
    left, top, right, bottom = view.page.evaluate(BOUNDS, types)
    across, down = right - left + 2 * MARGIN, bottom - top + 2 * MARGIN
    if square:
        side = max(across, down)
        left, top, across, down = left - (side - across) / 2, top - (side - down) / 2, side, side
    scale = width / across
    view.page.evaluate(LOOK_AT, [left - MARGIN, top - MARGIN, scale, *CORNER])
    view.page.wait_for_timeout(2000)
    shot = view.page.screenshot(clip={"x": CORNER[0], "y": CORNER[1], "width": width, "height": down * scale})
    return Image.open(io.BytesIO(shot)).convert("RGB")


def _pretend_files(workflow: dict, models: Path) -> None:
    """Empty files by the names that the template asks for, so that the frontend finds nothing missing."""
    for node in workflow["nodes"]:
        wanted = [(file["directory"], file["name"]) for file in node["properties"].get("models", ())]
        if node["type"] in ("EditSlidersLoadAdapter", "EditSlidersLoadProjector"):
            wanted = [("loras", name) for name in node["widgets_values"]]
        for folder, name in wanted:
            (models / folder).mkdir(parents=True, exist_ok=True)
            (models / folder / name).touch()
