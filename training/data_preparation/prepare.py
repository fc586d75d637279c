"""Renders edits at several strengths on ComfyUI servers and writes them as edit strips."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image, ImageOps
from tqdm import tqdm

from slider_core.figures.plots import check_matplotlib

from ..edit_strips import NUM_STRENGTHS
from ..errors import TrainingError
from ..examples import resize_to_area
from .config import PrepareConfig
from .distances import get_distance
from .edits import Edit, read_edits
from .graphs import build_graphs, fill_placeholders
from .rendering_server import RenderingFailed, RenderingServer, ServerUnavailable
from .report import write_report
from .strip_files import StripFiles, measure_strip
from .work_queue import WorkQueue

RENDERINGS_PER_STRIP = NUM_STRENGTHS + 1
"""The full edit and the strengths k / 6."""

_MAX_FAILURES = 10
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def prepare(config: PrepareConfig) -> str:
    """Render all missing edit strips and write the report. Returns the report as text.

    Raises SliderError when matplotlib, lpips or its weights are missing, TrainingError for invalid input and when no
    server is left.
    """
    check_matplotlib()
    preparation = _Preparation(config)
    missing = preparation.missing()
    num_left = asyncio.run(preparation.render(missing)) if missing else 0
    report = write_report(config, preparation.edits, preparation.abandoned)
    if num_left:
        raise TrainingError(
            f"{report}\n\nNo server is left, and {num_left} edits are not rendered. Start a ComfyUI server, add its "
            "address to servers and run the same command again: finished work is kept."
        )
    return report


class _UnusableImage(Exception):
    """The edit fails on any server."""


class _Preparation:
    """abandoned: edits that could not be rendered -> reason."""

    def __init__(self, config: PrepareConfig):
        self.config = config
        self.graphs = build_graphs(config.render)
        self.distance = get_distance(config.distance)
        self.edits = read_edits(config.data)
        self.strips = config.strips_folder
        self.abandoned: dict[Edit, str] = {}
        self._settings = json.dumps([self.graphs, config.seed, config.resolution, config.strip_resolution])
        self._rendered: dict[Edit, list[Image.Image]] = {}
        self._image_hashes: dict[Path, str] = {}
        self._bar: Any = None
        self._print = tqdm.write

    def missing(self) -> list[Edit]:
        """The edits without an up-to-date strip."""
        try:
            self.strips.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"{self.strips} cannot be created: {error.strerror}. Set output to another folder."
            ) from error
        edits = tqdm(self.edits, desc="checking existing strips", unit="edit", leave=False, dynamic_ncols=True)
        return [edit for edit in edits if not self._is_done(edit)]

    async def render(self, missing: Sequence[Edit]) -> int:
        """Render strips on all servers. Returns how many are left because no server remained."""
        async with aiohttp.ClientSession() as session:
            servers = await self._available(RenderingServer(url, session) for url in self.config.servers)
            queue = WorkQueue(missing, (server.url for server in servers))
            with tqdm(total=len(missing) * RENDERINGS_PER_STRIP, unit="image", dynamic_ncols=True) as self._bar:
                await _gather_or_cancel(self._work(server, queue) for server in servers)
        self.abandoned = queue.abandoned
        return len(queue.waiting)

    async def _available(self, servers: Iterable[RenderingServer]) -> list[RenderingServer]:
        available = []
        for server in servers:
            try:
                await server.check()
                available.append(server)
            except (ServerUnavailable, RenderingFailed) as error:
                self._print(f"{server.url} is not used: {error}")
        return available

    async def _work(self, server: RenderingServer, queue: WorkQueue[Edit]) -> None:
        """Render strips on one server until none is left or the server is unusable."""
        failures = 0
        while edit := await queue.take(server.url):
            try:
                await self._render_strip(server, edit)
            except _UnusableImage as error:
                await queue.abandon(server.url, str(error))
                self._discard(edit, str(error), abandoned=True)
            except RenderingFailed as error:
                failures += 1
                abandoned = await queue.failed(server.url, f"{server.url}: {error}")
                self._discard(edit, f"{server.url}: {error}", abandoned)
                if failures == _MAX_FAILURES:
                    self._print(f"{server.url} failed {failures} times in a row and is no longer used.")
                    break
            except ServerUnavailable as error:
                self._print(f"{error} It is no longer used; another server continues its edit.")
                break
            else:
                failures = 0
                await queue.done(server.url)
        await queue.worker_left(server.url)

    async def _render_strip(self, server: RenderingServer, edit: Edit) -> None:
        """Render the images of a strip that are still missing, measure the strip and write it."""
        source, made_of = await asyncio.to_thread(self._source, edit)
        rendered = self._rendered.setdefault(edit, [])
        seed = self._seed(edit)
        values: dict[str, Any] = {"instruction": edit.instruction, "seed": seed}
        values["image"] = await server.upload(await asyncio.to_thread(_png, source))
        if not rendered:
            await self._render(server, edit, fill_placeholders(self.graphs.edit, values), source.size)
        values["edit"] = await server.upload(await asyncio.to_thread(_png, rendered[0]))
        for k in range(len(rendered) - 1, NUM_STRENGTHS):
            graph = fill_placeholders(self.graphs.strengths, {**values, "strength": k / (NUM_STRENGTHS - 1)})
            await self._render(server, edit, graph, source.size)
        full, *intermediate = self._rendered.pop(edit)
        await asyncio.to_thread(self._write, edit, made_of, seed, [source, *intermediate, full])

    async def _render(
        self, server: RenderingServer, edit: Edit, graph: Mapping[str, Any], size: tuple[int, int]
    ) -> None:
        content = await server.render(graph)
        try:
            with Image.open(io.BytesIO(content)) as image:
                rendered = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        except _IMAGE_ERRORS as error:
            raise RenderingFailed(f"the server returned an unreadable image ({error})") from error
        self._rendered[edit].append(rendered)
        self._bar.update()

    def _source(self, edit: Edit) -> tuple[Image.Image, str]:
        """The resized source image, and the hash of the strip's inputs."""
        try:
            with Image.open(edit.image) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
            return resize_to_area(upright, self.config.resolution), self._made_of(edit)
        except _IMAGE_ERRORS as error:
            raise _UnusableImage(f"the image {edit.image} cannot be read: {error}") from error

    def _write(self, edit: Edit, made_of: str, seed: int, images: Sequence[Image.Image]) -> None:
        source = resize_to_area(images[0], self.config.strip_resolution)
        columns = [source, *(image.resize(source.size, Image.Resampling.LANCZOS) for image in images[1:])]
        record = {**self._description(edit), "seed": seed, "made_of": made_of, **measure_strip(columns, self.distance)}
        try:
            StripFiles(self.strips, edit.name).write(columns, record)
        except OSError as error:
            raise TrainingError(f"{self.strips / edit.name}.png cannot be written: {error.strerror}.") from error
        except ValueError as error:  # JSON has no NaN
            raise _UnusableImage(f"the distances between its images are not finite: {error}") from error

    def _is_done(self, edit: Edit) -> bool:
        """Whether the strip exists and was made of the same inputs.

        A record with another distance or category is updated without rendering.
        """
        files = StripFiles(self.strips, edit.name)
        record, description = files.read_record(), self._description(edit)
        try:
            if record.get("made_of") != self._made_of(edit):
                return False
            if any(record.get(key) != value for key, value in description.items()):
                files.write_record({**record, **description, **measure_strip(files.read_columns(), self.distance)})
        except _IMAGE_ERRORS:  # damaged source or strip; rendering it reports the error
            return False
        return True

    def _description(self, edit: Edit) -> dict[str, Any]:
        return {"edit_instruction": edit.instruction, "category": edit.category, "distance": self.config.distance}

    def _made_of(self, edit: Edit) -> str:
        """Hash of all inputs of a strip."""
        if edit.image not in self._image_hashes:
            self._image_hashes[edit.image] = hashlib.sha256(edit.image.read_bytes()).hexdigest()
        return hashlib.sha256(f"{self._image_hashes[edit.image]} {self._settings}".encode()).hexdigest()[:40]

    def _seed(self, edit: Edit) -> int:
        """Different noise for every edit, the same in every run."""
        return (self.config.seed + zlib.crc32(edit.name.encode())) % 2**32

    def _discard(self, edit: Edit, reason: str, abandoned: bool) -> None:
        """Discard the renderings of an edit that failed on a server."""
        self._bar.update(-len(self._rendered.pop(edit, ())))
        if abandoned:
            self._bar.total -= RENDERINGS_PER_STRIP
        self._bar.refresh()
        consequence = "skipped" if abandoned else "left to another server"
        self._print(f"{edit.image.name}, {edit.instruction!r}, {consequence}: {reason}")


async def _gather_or_cancel(coroutines: Any) -> None:
    """Wait for all; when one raises, or this is cancelled, cancel the others and wait for them."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()
