"""HTTP routes for the page: the tokens of a prompt, and a sweep's images as one file."""

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
from ..slider_core.figures.contact_sheet import contact_sheet, encode_png, encode_webp
from ..slider_core.text.encode import SPLITTERS
from ..slider_core.text.token_preview import phrase_tokens
from .slider_prompt import last_clip

MAX_IMAGES = 1024
MAX_PIXELS = 200_000_000


def add_routes(routes: web.RouteTableDef) -> None:
    """Add the pack's routes to ComfyUI's server, before it starts."""
    routes.post("/edit_sliders/tokens")(_handler(_tokens))
    routes.post("/edit_sliders/sweep_file")(_handler(_sweep_file))


def _handler(respond: Callable[[Mapping[str, Any]], web.Response]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that runs `respond(JSON body)` outside the event loop and answers SliderErrors with status 400."""

    async def handler(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            if not isinstance(body, dict):
                raise SliderError(f"The request is a {type(body).__name__}; expected a JSON object.")
            return await asyncio.get_running_loop().run_in_executor(None, respond, body)
        except (SliderError, ValueError) as error:
            return web.json_response({"error": str(error)}, status=400)

    return handler


def _tokens(body: Mapping[str, Any]) -> web.Response:
    """{text, mode} -> {phrases: [{tokens: {encoder: [token text]}, error}]}."""
    text, mode = body.get("text"), body.get("mode")
    if not isinstance(text, str) or mode not in SPLITTERS:
        raise SliderError(f"Expected a text and a mode, one of {', '.join(map(repr, SPLITTERS))}; got mode {mode!r}.")
    phrases = phrase_tokens(last_clip() or _tokenizer_only_clip(), text, mode)
    return web.json_response({"phrases": [phrase._asdict() for phrase in phrases]})


@cache
def _tokenizer_only_clip() -> Any:
    """The tokenizing half of a CLIP, for use until a node has loaded one."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    return SimpleNamespace(tokenizer=FAMILIES[0].tokenizer(embeddings), tokenizer_options={})


def _sweep_file(body: Mapping[str, Any]) -> web.Response:
    """{format: webp|strip|grid, frames: [{filename, subfolder, type}], captions, columns, heading, metadata} -> file"""
    frames, captions = body.get("frames", []), body.get("captions", [])
    columns, heading, metadata = body.get("columns"), body.get("heading", ""), body.get("metadata", {})
    if not (
        _is_list_of(dict, frames) and _is_list_of(str, captions) and 0 < len(frames) == len(captions) <= MAX_IMAGES
    ):
        raise SliderError(f"Expected 1 to {MAX_IMAGES} frames and a caption for each.")
    if type(columns) is not int or not 1 <= columns <= len(frames):
        raise SliderError(f"columns is {columns!r}; expected 1 to {len(frames)}.")
    if not (
        isinstance(heading, str) and isinstance(metadata, dict) and _is_list_of(str, [*metadata, *metadata.values()])
    ):
        raise SliderError("Expected heading to be a string and metadata to map strings to strings.")
    metadata = {name: json.dumps(json.loads(value)) for name, value in metadata.items()}  # ASCII, as ComfyUI writes it
    images = [_read_image(frame, MAX_PIXELS // len(frames)) for frame in frames]
    if body.get("format") == "webp":
        return web.Response(body=encode_webp(images, metadata), content_type="image/webp")
    if body.get("format") not in ("strip", "grid"):
        raise SliderError(f"format is {body.get('format')!r}; expected 'webp', 'strip' or 'grid'.")
    columns = columns if body["format"] == "grid" else len(images)
    sheet = contact_sheet(images, captions, columns, heading)
    return web.Response(body=encode_png(sheet, metadata), content_type="image/png")


def _is_list_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _read_image(frame: Mapping[str, Any], max_pixels: int) -> Image.Image:
    """An image that a node has saved or previewed, scaled down to at most `max_pixels`."""
    kind, name = frame.get("type"), os.path.join(str(frame.get("subfolder", "")), str(frame.get("filename", "")))
    folder = folder_paths.get_directory_by_type(kind) if isinstance(kind, str) else None
    path = os.path.realpath(os.path.join(folder or "", name))
    if folder is None or not folder_paths.is_within_directory(folder, path):
        raise SliderError(f"{name!r} of type {kind!r} is not in ComfyUI's output, temp or input folder.")
    try:
        with Image.open(path) as image:
            scale = min(1.0, math.sqrt(max_pixels / (image.width * image.height)))
            return image.convert("RGB").resize([max(round(side * scale), 1) for side in image.size])
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise SliderError(f"The image {name!r} can no longer be read. Render the sweep again.") from None
