"""The node that saves a sweep as one image and as an animation."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image

from ..slider_core import node_names as names
from ..slider_core.figures.captions import sweep_captions
from ..slider_core.figures.contact_sheet import contact_sheet, encode_png, encode_webp
from ..slider_core.strength import Strengths
from .common import categories
from .common.sockets import StrengthsSocket


class SaveSweepGrid(io.ComfyNode):
    """Combines the images of a sweep into one image with captions, and saves it and an animation of the images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSweepSheet",
            display_name=names.SAVE_SWEEP_GRID,
            category=categories.SWEEP,
            description="Combines the images of a sweep into a row or a grid with captions and saves it as PNG, and an "
            "animation of the images as WebP. Both files contain the workflow.",
            search_aliases=["sweep sheet", "contact sheet", "filmstrip", "xy plot", "image grid", "animated webp"],
            inputs=[
                io.Image.Input("images", tooltip="One image per strength."),
                StrengthsSocket.Input(
                    "strengths",
                    optional=True,
                    tooltip="The strengths that the images were rendered with, for the captions. From "
                    f"{names.STRENGTH_GRID}: row_strengths.",
                ),
                StrengthsSocket.Input(
                    "across",
                    display_name="column_strengths",
                    optional=True,
                    tooltip=f"For the captions of a grid: column_strengths from {names.STRENGTH_GRID}.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=256,
                    tooltip=f"Number of images per row; 0 = all in one row. From {names.STRENGTH_GRID}.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One caption per line and image. Empty: the strengths.",
                ),
                io.String.Input("heading", display_name="title", default="", tooltip="Title above the grid."),
                io.String.Input("filename_prefix", default="sweeps/sweep", tooltip="File name in the output folder."),
            ],
            outputs=[io.Image.Output("sheet", display_name="grid", tooltip="The grid as an image.")],
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
        cells = [Image.fromarray(np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)) for image in images]
        lists = [one for one in (strengths, across) if one is not None]
        grid = contact_sheet(
            cells, sweep_captions(len(cells), lists, captions), min(columns or len(cells), len(cells)), heading
        )
        metadata = _metadata(cls)
        files = {"png": encode_png(grid, metadata)}
        if len(cells) > 1:
            files["webp"] = encode_webp(cells, metadata)
        as_image = torch.from_numpy(np.asarray(grid, np.float32) / 255)[None]
        return io.NodeOutput(as_image, ui=ui.SavedImages(_save(filename_prefix, files)))


def _metadata(node: type[io.ComfyNode]) -> dict[str, str]:
    """The metadata that Save Image writes: prompt and workflow, unless ComfyUI was started with --disable-metadata."""
    if args.disable_metadata:
        return {}
    metadata = {"prompt": node.hidden.prompt, **(node.hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in metadata.items() if value is not None}


def _save(prefix: str, files: dict[str, bytes]) -> list[ui.SavedResult]:
    """Write files (extension -> content) to the output folder, all with the same new number."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    results = []
    for extension, content in files.items():
        file = f"{name}_{counter:05}_.{extension}"
        (Path(folder) / file).write_bytes(content)
        results.append(ui.SavedResult(file, subfolder, io.FolderType.output))
    return results


NODES: list[type[io.ComfyNode]] = [SaveSweepGrid]
