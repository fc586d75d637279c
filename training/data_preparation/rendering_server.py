"""A running ComfyUI, used over its HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

import aiohttp

UPLOADS = "edit_sliders"
"""Folder among the server's temporary files, which it clears itself, for what is uploaded."""

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 0.5
_TIMES = aiohttp.ClientTimeout(total=120, sock_connect=10)
_GATEWAY_ERRORS = (502, 503, 504)


class ServerGone(Exception):
    """The server does not answer, or not as a ComfyUI."""


class RenderingFailed(Exception):
    """The server refused a graph or could not run it; says why in the server's words."""


class RenderingServer:
    """url: its address, without a slash at the end."""

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url = url
        self._session = session

    async def check(self) -> None:
        """Raises ServerGone when no ComfyUI answers."""
        if "system" not in await self._json("GET", "/system_stats"):
            raise ServerGone(f"{self.url} answers, but not as a ComfyUI does.")

    async def upload(self, png: bytes) -> str:
        """Put a picture among the server's temporary files, if it is not there. Returns its name for LoadImage.

        One that is there is not written again: another prompt may be reading it.
        """
        name = f"{hashlib.sha256(png).hexdigest()[:32]}.png"
        form = aiohttp.FormData({"type": "temp", "subfolder": UPLOADS})
        form.add_field("image", png, filename=name, content_type="image/png")
        stored = await self._json("POST", "/upload/image", data=form)
        if not {"name", "subfolder", "type"} <= set(stored):
            raise ServerGone(f"{self.url} did not store a picture; it said {stored}.")
        return f"{stored['subfolder']}/{stored['name']} [{stored['type']}]"

    async def render(self, graph: Mapping[str, Any]) -> bytes:
        """Run a graph and return the file of the one picture that it saves or previews.

        When cancelled the prompt is taken from the server's queue, or interrupted. Raises RenderingFailed, ServerGone.
        """
        prompt = str(uuid.uuid4())
        try:
            answer = await self._json("POST", "/prompt", json={"prompt": graph, "prompt_id": prompt})
            prompt = str(answer.get("prompt_id"))
            entry = await self._result(prompt)
        except asyncio.CancelledError:
            with contextlib.suppress(ServerGone, RenderingFailed, asyncio.CancelledError):
                await asyncio.wait_for(self._withdraw(prompt), 5)
            raise
        if entry["status"]["status_str"] != "success":
            raise RenderingFailed(_reason(entry["status"]["messages"]))
        return await self._answer("GET", "/view", params=_only_picture(entry["outputs"]))

    async def _result(self, prompt: str) -> dict[str, Any]:
        wait = _FIRST_WAIT
        while True:
            history = f"/history/{prompt}"
            if entry := (await self._json("GET", history)).get(prompt):
                return entry
            queue = await self._json("GET", "/queue")
            waiting = {item[1] for part in ("queue_running", "queue_pending") for item in queue.get(part, ())}
            if prompt not in waiting:  # done just now, or lost
                if entry := (await self._json("GET", history)).get(prompt):
                    return entry
                raise ServerGone(f"{self.url} knows nothing of a prompt that it accepted; was it restarted?")
            await asyncio.sleep(wait)
            wait = min(1.5 * wait, _LONGEST_WAIT)

    async def _withdraw(self, prompt: str) -> None:
        await self._answer("POST", "/queue", json={"delete": [prompt]})
        await self._answer("POST", "/interrupt", json={"prompt_id": prompt})

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        content = await self._answer(method, path, **options)
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerGone(f"{self.url} answers, but not as a ComfyUI does.")
        return answer

    async def _answer(self, method: str, path: str, **options: Any) -> bytes:
        try:
            async with self._session.request(method, self.url + path, timeout=_TIMES, **options) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError, OSError) as error:
            raise ServerGone(f"{self.url} does not answer ({error or type(error).__name__}).") from error
        if response.status in _GATEWAY_ERRORS:
            raise ServerGone(f"{self.url} does not answer (HTTP {response.status}).")
        if response.status != 200:
            raise RenderingFailed(_refusal(response.status, content))
        return content


def _refusal(status: int, content: bytes) -> str:
    """What a server said that did not accept a graph."""
    try:
        answer = json.loads(content)
        said = [f"{answer['error']['message']} {answer['error']['details']}".strip()]
        for node, report in (answer["node_errors"] or {}).items():
            errors = (f"{error['message']}: {error['details']}" for error in report["errors"])
            said += [f"{report['class_type']} ({node}): {error}" for error in errors]
        return "; ".join(said)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {status} {content[:300].decode(errors='replace')}".strip()


def _reason(messages: list[Any]) -> str:
    """Why a prompt did not end well."""
    told = dict(messages)
    if error := told.get("execution_error"):
        return f"{error['node_type']}: {error['exception_message'].strip()}"
    return "interrupted on the server" if "execution_interrupted" in told else f"no reason given: {told}"


def _only_picture(outputs: Mapping[str, Any]) -> dict[str, str]:
    """Where the picture of a graph's outputs is; a saved one rather than a previewed one."""
    pictures = [picture for output in outputs.values() for picture in output.get("images", ())]
    saved = [picture for picture in pictures if picture["type"] == "output"]
    chosen = saved or pictures
    if len(chosen) != 1:
        raise RenderingFailed(
            f"the graph made {len(chosen)} pictures; expected one, from one Save Image or Preview Image node"
        )
    return {key: chosen[0][key] for key in ("filename", "subfolder", "type")}
