"""python -m training prepare: renders edits at several strengths on ComfyUI servers, as stacks to learn from."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image, ImageOps
from tqdm import tqdm

from slider_core.errors import SliderError
from slider_core.figures.plots import check_matplotlib

from ..edit_strips import INNER
from ..errors import TrainingError
from ..examples import resized
from .config import PrepareConfig
from .distances import distance_named
from .edits import Edit, read_edits
from .graphs import filled, graphs_for
from .rendering_server import RenderingFailed, RenderingServer, ServerGone
from .report import write_report
from .strip_files import StackFiles, measured
from .work_queue import Shared

RENDERINGS = INNER + 1
"""Of one stack: the full edit, then the strengths k / 6."""

_MOST_FAILURES = 10
_DAMAGED = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def prepare(config: PrepareConfig) -> str:
    """Make all stacks that are not there yet, and the report. Returns the report as text.

    Raises TrainingError when something is missing, or when no server is left to go on.
    """
    try:
        check_matplotlib()
    except SliderError as error:
        raise TrainingError(str(error)) from error
    preparation = _Preparation(config)
    missing = preparation.missing()
    left = asyncio.run(preparation.make(missing)) if missing else 0
    report = write_report(config, preparation.stacks, preparation.edits, preparation.given_up)
    if left:
        raise TrainingError(
            f"{report}\n\nNo server is left, and {left} edits are not rendered. Start a ComfyUI, set servers to its "
            "address and run the same command again: what is done is kept."
        )
    return report


class _BadPicture(Exception):
    """Cannot be made by any server."""


class _Preparation:
    """given_up: the edits that could not be made, and why."""

    def __init__(self, config: PrepareConfig):
        self.config = config
        self.graphs = graphs_for(config.render)
        self.distance = distance_named(config.distance)
        self.edits = read_edits(config.data)
        self.stacks = config.output / "stacks"
        self.given_up: dict[Edit, str] = {}
        self._settings = json.dumps([self.graphs, config.seed, config.resolution, config.stack_resolution])
        self._rendered: dict[Edit, list[Image.Image]] = {}
        self._digests: dict[Path, str] = {}
        self._bar: Any = None
        self._say = tqdm.write

    def missing(self) -> list[Edit]:
        """The edits whose stacks are not there yet."""
        try:
            self.stacks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"{self.stacks} cannot be made: {error.strerror}. Set output to another folder."
            ) from error
        edits = tqdm(self.edits, desc="what is there", unit="edit", leave=False, dynamic_ncols=True)
        return [edit for edit in edits if not self._is_done(edit)]

    async def make(self, missing: Sequence[Edit]) -> int:
        """Returns how many are left because no server was."""
        async with aiohttp.ClientSession() as session:
            servers = await self._answering(RenderingServer(url, session) for url in self.config.servers)
            shared = Shared(missing, (server.url for server in servers))
            with tqdm(total=len(missing) * RENDERINGS, unit="picture", dynamic_ncols=True) as self._bar:
                await _all_or_none(self._work(server, shared) for server in servers)
        self.given_up = shared.given_up
        return len(shared.waiting)

    async def _answering(self, servers: Any) -> list[RenderingServer]:
        """The servers that are there."""
        there = []
        for server in servers:
            try:
                await server.check()
                there.append(server)
            except (ServerGone, RenderingFailed) as error:
                self._say(f"{server.url} is left out: {error}")
        return there

    async def _work(self, server: RenderingServer, shared: Shared[Edit]) -> None:
        """Make stacks on one server until there are none left, or the server is of no use."""
        failures = 0
        while edit := await shared.take(server.url):
            try:
                await self._make(server, edit)
            except _BadPicture as error:
                await shared.impossible(server.url, str(error))
                self._forget(edit, str(error), given_up=True)
            except RenderingFailed as error:
                failures += 1
                given_up = await shared.failed(server.url, f"{server.url}: {error}")
                self._forget(edit, f"{server.url}: {error}", given_up)
                if failures == _MOST_FAILURES:
                    self._say(f"{server.url} failed {failures} times in a row and is left out.")
                    break
            except ServerGone as error:
                self._say(f"{error} It is left out; its edit goes to another.")
                break
            else:
                failures = 0
                await shared.done(server.url)
        await shared.leave(server.url)

    async def _make(self, server: RenderingServer, edit: Edit) -> None:
        """Render what is missing of one stack, measure and write it."""
        source, made_of = await asyncio.to_thread(self._source, edit)
        rendered = self._rendered.setdefault(edit, [])
        seed = self._seed(edit)
        values: dict[str, Any] = {"instruction": edit.instruction, "seed": seed}
        values["image"] = await server.upload(await asyncio.to_thread(_png, source))
        if not rendered:
            await self._render(server, edit, filled(self.graphs.edit, values), source.size)
        values["edit"] = await server.upload(await asyncio.to_thread(_png, rendered[0]))
        for k in range(len(rendered) - 1, INNER):
            graph = filled(self.graphs.strengths, {**values, "strength": k / (INNER - 1)})
            await self._render(server, edit, graph, source.size)
        full, *between = self._rendered.pop(edit)
        await asyncio.to_thread(self._write, edit, made_of, seed, [source, *between, full])

    async def _render(
        self, server: RenderingServer, edit: Edit, graph: Mapping[str, Any], size: tuple[int, int]
    ) -> None:
        content = await server.render(graph)
        try:
            with Image.open(io.BytesIO(content)) as picture:
                one = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        except _DAMAGED as error:
            raise RenderingFailed(f"it gave a picture that cannot be read ({error})") from error
        self._rendered[edit].append(one)
        self._bar.update()

    def _source(self, edit: Edit) -> tuple[Image.Image, str]:
        """The picture to edit, and the digest of all that a stack is made of."""
        try:
            with Image.open(edit.image) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
            return resized(upright, self.config.resolution), self._made_of(edit)
        except _DAMAGED as error:
            raise _BadPicture(f"the picture {edit.image} cannot be read: {error}") from error

    def _write(self, edit: Edit, made_of: str, seed: int, pictures: Sequence[Image.Image]) -> None:
        source = resized(pictures[0], self.config.stack_resolution)
        columns = [source, *(one.resize(source.size, Image.Resampling.LANCZOS) for one in pictures[1:])]
        record = {**self._described(edit), "seed": seed, "made_of": made_of, **measured(columns, self.distance)}
        try:
            StackFiles(self.stacks, edit.name).write(columns, record)
        except OSError as error:
            raise TrainingError(f"{self.stacks / edit.name}.png cannot be written: {error.strerror}.") from error
        except ValueError as error:  # JSON has no NaN
            raise _BadPicture(f"the distances between its pictures are no numbers: {error}") from error

    def _is_done(self, edit: Edit) -> bool:
        """Whether its stack is there, made of just this. A record with another distance or category is made anew."""
        files = StackFiles(self.stacks, edit.name)
        known, described = files.known(), self._described(edit)
        try:
            if known.get("made_of") != self._made_of(edit):
                return False
            if any(known.get(key) != value for key, value in described.items()):
                files.write_record({**known, **described, **measured(files.pictures(), self.distance)})
        except _DAMAGED:  # source or stack; _make tells of it
            return False
        return True

    def _described(self, edit: Edit) -> dict[str, Any]:
        return {"edit_instruction": edit.instruction, "category": edit.category, "distance": self.config.distance}

    def _made_of(self, edit: Edit) -> str:
        if edit.image not in self._digests:
            self._digests[edit.image] = hashlib.sha256(edit.image.read_bytes()).hexdigest()
        return hashlib.sha256(f"{self._digests[edit.image]} {self._settings}".encode()).hexdigest()[:40]

    def _seed(self, edit: Edit) -> int:
        """Other noise for every edit, the same on every run."""
        return (self.config.seed + zlib.crc32(edit.name.encode())) % 2**32

    def _forget(self, edit: Edit, why: str, given_up: bool) -> None:
        """What was rendered of an edit that a server failed at."""
        self._bar.update(-len(self._rendered.pop(edit, ())))
        if given_up:
            self._bar.total -= RENDERINGS
        self._bar.refresh()
        what_now = "skipped" if given_up else "another server may try"
        self._say(f"{edit.image.name}, {edit.instruction!r}, {what_now}: {why}")


async def _all_or_none(works: Any) -> None:
    """Wait for all; when one raises, or this is cancelled, end the others first."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return content.getvalue()
