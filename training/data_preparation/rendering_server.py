"""Client of a running ComfyUI server, over its HTTP API."""

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
"""Subfolder for uploads in the server's temporary folder, which the server clears when it starts."""

_MIN_POLL_SECONDS, _MAX_POLL_SECONDS = 0.05, 0.5
_TIMEOUT = aiohttp.ClientTimeout(total=120, sock_connect=10)
_GATEWAY_ERRORS = (502, 503, 504)


class ServerUnavailable(Exception):
    """The server does not respond, or is not ComfyUI."""


class RenderingFailed(Exception):
    """The server rejected a graph or could not run it; contains the server's message."""


class RenderingServer:
    """url: the server's address, without a trailing slash."""

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url = url
        self._session = session

    async def check(self) -> None:
        """Raises ServerUnavailable when no ComfyUI responds."""
        if "system" not in await self._json("GET", "/system_stats"):
            raise ServerUnavailable(f"{self.url} responds, but is not a ComfyUI server.")

    async def upload(self, png: bytes) -> str:
        """Upload an image as a temporary file, unless the server has it already. Returns its name for Load Image.

        An existing file is not overwritten, because another prompt may be reading it.
        """
        name = f"{hashlib.sha256(png).hexdigest()[:32]}.png"
        form = aiohttp.FormData({"type": "temp", "subfolder": UPLOADS})
        form.add_field("image", png, filename=name, content_type="image/png")
        stored = await self._json("POST", "/upload/image", data=form)
        if not {"name", "subfolder", "type"} <= set(stored):
            raise ServerUnavailable(f"{self.url} did not store an uploaded image; it responded {stored}.")
        return f"{stored['subfolder']}/{stored['name']} [{stored['type']}]"

    async def render(self, graph: Mapping[str, Any]) -> bytes:
        """Run a graph. Returns the file of the one image that it saves or previews.

        Cancelling removes the prompt from the server's queue or interrupts it. Raises RenderingFailed and
        ServerUnavailable.
        """
        prompt = str(uuid.uuid4())
        try:
            response = await self._json("POST", "/prompt", json={"prompt": graph, "prompt_id": prompt})
            prompt = str(response.get("prompt_id"))
            entry = await self._result(prompt)
        except asyncio.CancelledError:
            with contextlib.suppress(ServerUnavailable, RenderingFailed, asyncio.CancelledError):
                await asyncio.wait_for(self._withdraw(prompt), 5)
            raise
        if entry["status"]["status_str"] != "success":
            raise RenderingFailed(_failure(entry["status"]["messages"]))
        return await self._request("GET", "/view", params=_single_image(entry["outputs"]))

    async def _result(self, prompt: str) -> dict[str, Any]:
        wait = _MIN_POLL_SECONDS
        while True:
            history = f"/history/{prompt}"
            if entry := (await self._json("GET", history)).get(prompt):
                return entry
            queue = await self._json("GET", "/queue")
            waiting = {item[1] for state in ("queue_running", "queue_pending") for item in queue.get(state, ())}
            if prompt not in waiting:  # just finished, or lost
                if entry := (await self._json("GET", history)).get(prompt):
                    return entry
                raise ServerUnavailable(
                    f"{self.url} no longer knows a prompt that it accepted; it may have been restarted."
                )
            await asyncio.sleep(wait)
            wait = min(1.5 * wait, _MAX_POLL_SECONDS)

    async def _withdraw(self, prompt: str) -> None:
        await self._request("POST", "/queue", json={"delete": [prompt]})
        await self._request("POST", "/interrupt", json={"prompt_id": prompt})

    async def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        content = await self._request(method, path, **options)
        try:
            response = json.loads(content)
        except ValueError:
            response = None
        if not isinstance(response, dict):
            raise ServerUnavailable(f"{self.url} responds, but is not a ComfyUI server.")
        return response

    async def _request(self, method: str, path: str, **options: Any) -> bytes:
        try:
            async with self._session.request(method, self.url + path, timeout=_TIMEOUT, **options) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError, OSError) as error:
            raise ServerUnavailable(f"{self.url} does not respond ({error or type(error).__name__}).") from error
        if response.status in _GATEWAY_ERRORS:
            raise ServerUnavailable(f"{self.url} does not respond (HTTP {response.status}).")
        if response.status != 200:
            raise RenderingFailed(_rejection(response.status, content))
        return content


def _rejection(status: int, content: bytes) -> str:
    """The error messages of a server that rejected a graph."""
    try:
        response = json.loads(content)
        messages = [f"{response['error']['message']} {response['error']['details']}".strip()]
        for node, report in (response["node_errors"] or {}).items():
            errors = (f"{error['message']}: {error['details']}" for error in report["errors"])
            messages += [f"{report['class_type']} ({node}): {error}" for error in errors]
        return "; ".join(messages)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {status} {content[:300].decode(errors='replace')}".strip()


def _failure(messages: list[Any]) -> str:
    """Why a prompt failed, from the status messages in the server's history."""
    events = dict(messages)
    if error := events.get("execution_error"):
        return f"{error['node_type']}: {error['exception_message'].strip()}"
    return "interrupted on the server" if "execution_interrupted" in events else f"no reason given: {events}"


def _single_image(outputs: Mapping[str, Any]) -> dict[str, str]:
    """The /view parameters of the one saved image, or of the one previewed image if none is saved."""
    images = [image for output in outputs.values() for image in output.get("images", ())]
    saved = [image for image in images if image["type"] == "output"]
    candidates = saved or images
    if len(candidates) != 1:
        raise RenderingFailed(
            f"the graph outputs {len(candidates)} images; expected one, from one Save Image or Preview Image node"
        )
    return {key: candidates[0][key] for key in ("filename", "subfolder", "type")}
