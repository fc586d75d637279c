"""A sweep as one picture and as an animation."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image

from ..slider_core.figures.captions import captions_of
from ..slider_core.figures.contact_sheet import animated_webp, contact_sheet, png
from ..slider_core.strength import Strengths
from .common.sockets import CATEGORY, StrengthsSocket


class SweepSheet(io.ComfyNode):
    """Puts the pictures of a sweep side by side with captions, and saves them so and as an animation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSweepSheet",
            display_name="Sweep Sheet",
            category=CATEGORY,
            description="The pictures of a sweep side by side, or as a grid, with their strengths under them. Saves "
            "it as PNG, and an animation of the pictures as WebP, both with the workflow.",
            search_aliases=["contact sheet", "filmstrip", "xy plot", "image grid", "animated webp"],
            inputs=[
                io.Image.Input("images", tooltip="One picture per strength."),
                StrengthsSocket.Input(
                    "strengths", optional=True, tooltip="What they were rendered with, for the captions."
                ),
                StrengthsSocket.Input("across", optional=True, tooltip="The second list of a Strength Grid."),
                io.Int.Input(
                    "columns", default=0, min=0, max=256, tooltip="Pictures in a row; 0 = all. From Strength Grid."
                ),
                io.String.Input(
                    "captions", multiline=True, default="", tooltip="One line per picture. Empty: their strengths."
                ),
                io.String.Input("heading", default="", tooltip="Stands above the sheet."),
                io.String.Input("filename_prefix", default="sweeps/sweep", tooltip="In the output folder."),
            ],
            outputs=[io.Image.Output("sheet")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        columns: int,
        captions: str,
        heading: str,
        filename_prefix: str,
        strengths: Strengths | None = None,
        across: Strengths | None = None,
    ) -> io.NodeOutput:
        pictures = [Image.fromarray(np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)) for image in images]
        under = captions_of(len(pictures), [one for one in (strengths, across) if one is not None], captions)
        sheet = contact_sheet(pictures, under, min(columns or len(pictures), len(pictures)), heading)
        metadata = _metadata(cls)
        files = {"png": png(sheet, metadata)}
        if len(pictures) > 1:
            files["webp"] = animated_webp(pictures, metadata)
        as_image = torch.from_numpy(np.asarray(sheet, np.float32) / 255)[None]
        return io.NodeOutput(as_image, ui=ui.SavedImages(_saved(filename_prefix, files)))


def _metadata(node: type[io.ComfyNode]) -> dict[str, str]:
    """What Save Image writes: the prompt and the workflow, unless ComfyUI was started with --disable-metadata."""
    if args.disable_metadata:
        return {}
    known = {"prompt": node.hidden.prompt, **(node.hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in known.items() if value is not None}


def _saved(prefix: str, files: dict[str, bytes]) -> list[ui.SavedResult]:
    """Writes the files, by their endings, to the output folder under one new number."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    results = []
    for ending, content in files.items():
        file = f"{name}_{counter:05}_.{ending}"
        (Path(folder) / file).write_bytes(content)
        results.append(ui.SavedResult(file, subfolder, io.FolderType.output))
    return results
