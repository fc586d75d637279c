"""What the page asks of the server: the tokens of a prompt, and a sweep's pictures as one file."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import folder_paths
from aiohttp import web
from PIL import Image

from ..slider_core.errors import SliderError
from ..slider_core.families import FAMILIES
from ..slider_core.figures.contact_sheet import animated_webp, contact_sheet, png
from ..slider_core.text.encode import SPLITTERS
from ..slider_core.text.token_preview import phrase_tokens
from .slider_prompt import last_clip

MOST_PICTURES = 1024
MOST_PIXELS = 200_000_000


def add_routes(routes: web.RouteTableDef) -> None:
    """Make the pack's routes known to ComfyUI's server, before it starts."""
    routes.post("/edit_sliders/tokens")(_answers(_tokens))
    routes.post("/edit_sliders/sweep_file")(_answers(_sweep_file))


def _answers(work: Callable[[Mapping[str, Any]], web.Response]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that works beside the server's event loop and answers 400 with the message of a SliderError."""

    async def handler(request: web.Request) -> web.Response:
        try:
            wanted = await request.json()
            if not isinstance(wanted, dict):
                raise SliderError(f"The request is a {type(wanted).__name__}; expected a JSON object.")
            return await asyncio.get_running_loop().run_in_executor(None, work, wanted)
        except (SliderError, ValueError) as error:
            return web.json_response({"error": str(error)}, status=400)

    return handler


def _tokens(wanted: Mapping[str, Any]) -> web.Response:
    """{text, mode} -> {phrases: [{tokens: {encoder: [piece]}, error}]}."""
    text, mode = wanted.get("text"), wanted.get("mode")
    if not isinstance(text, str) or mode not in SPLITTERS:
        raise SliderError(f"Expected a text and a mode, one of {', '.join(map(repr, SPLITTERS))}; found {mode!r}.")
    phrases = phrase_tokens(last_clip() or _tokenizing_only(), text, mode)
    return web.json_response({"phrases": [phrase._asdict() for phrase in phrases]})


@cache
def _tokenizing_only() -> Any:
    """The part of a CLIP that splits text, for as long as no node has loaded one."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    return SimpleNamespace(tokenizer=FAMILIES[0].tokenizer(embeddings), tokenizer_options={})


def _sweep_file(wanted: Mapping[str, Any]) -> web.Response:
    """{format: webp|strip|grid, frames: [{filename, subfolder, type}], captions, columns, heading, metadata} -> file"""
    frames, captions = wanted.get("frames", []), wanted.get("captions", [])
    columns, heading, metadata = wanted.get("columns"), wanted.get("heading", ""), wanted.get("metadata", {})
    if not (_are(dict, frames) and _are(str, captions) and 0 < len(frames) == len(captions) <= MOST_PICTURES):
        raise SliderError(f"Expected 1 to {MOST_PICTURES} frames and a caption for each.")
    if type(columns) is not int or not 1 <= columns <= len(frames):
        raise SliderError(f"columns is {columns!r}; expected 1 to {len(frames)}.")
    if not (isinstance(heading, str) and isinstance(metadata, dict) and _are(str, [*metadata, *metadata.values()])):
        raise SliderError("Expected a heading and metadata that are texts.")
    metadata = {
        name: json.dumps(json.loads(value)) for name, value in metadata.items()
    }  # in ASCII, as ComfyUI writes it
    pictures = [_picture(frame, MOST_PIXELS // len(frames)) for frame in frames]
    if wanted.get("format") == "webp":
        return web.Response(body=animated_webp(pictures, metadata), content_type="image/webp")
    if wanted.get("format") not in ("strip", "grid"):
        raise SliderError(f"format is {wanted.get('format')!r}; expected 'webp', 'strip' or 'grid'.")
    columns = columns if wanted["format"] == "grid" else len(pictures)
    sheet = contact_sheet(pictures, captions, columns, heading)
    return web.Response(body=png(sheet, metadata), content_type="image/png")


def _are(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _picture(frame: Mapping[str, Any], most_pixels: int) -> Image.Image:
    """A picture that a node has saved or previewed, made smaller if it has more pixels than there is room for."""
    kind, name = frame.get("type"), os.path.join(str(frame.get("subfolder", "")), str(frame.get("filename", "")))
    folder = folder_paths.get_directory_by_type(kind) if isinstance(kind, str) else None
    path = os.path.realpath(os.path.join(folder or "", name))
    if folder is None or not folder_paths.is_within_directory(folder, path):
        raise SliderError(f"{name!r} of {kind!r} is no picture of ComfyUI's output, temp or input folder.")
    try:
        with Image.open(path) as picture:
            smaller = min(1.0, math.sqrt(most_pixels / (picture.width * picture.height)))
            return picture.convert("RGB").resize([max(round(side * smaller), 1) for side in picture.size])
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise SliderError(f"The picture {name!r} cannot be read any more. Render the sweep again.") from None
