"""A real ComfyUI in a subprocess, driven over HTTP, for tests, the demo and benchmarks."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

START_SECONDS = 180
STOP_SECONDS = 10
POLL_SECONDS = 0.05
LOG_TAIL_LINES = 40

Graph = Mapping[str, Mapping[str, Any]]


class ServerError(Exception):
    """ComfyUI did not start or exited; the message ends with the tail of its log."""


class PromptRejected(Exception):
    """ComfyUI's validation rejected a graph. node_errors: node id -> its entry in the response."""

    def __init__(self, error: Mapping[str, Any], node_errors: Mapping[str, Any]) -> None:
        self.error = error
        self.node_errors = node_errors
        details = [
            f"{node} ({report['class_type']}): {e['message']}: {e['details']}"
            for node, report in node_errors.items()
            for e in report["errors"]
        ]
        super().__init__("\n".join([f"{error['message']} {error['details']}".strip(), *details]))


@dataclass(frozen=True)
class Result:
    """The result of one prompt.

    outputs: node id -> its ui output.
    error: the execution_error message (node_id, node_type, exception_message, traceback, ...), or None.
    executed: ids of the nodes that ran, without cached ones; after an error, of those that finished.
    """

    server: ComfyServer
    ok: bool
    outputs: dict[str, dict[str, Any]]
    error: dict[str, Any] | None
    interrupted: bool
    executed: set[str]

    def images(self, node_id: str) -> list[Image.Image]:
        """The images that a node saved or previewed, in its order."""
        return [Image.open(io.BytesIO(self.server.view(file))) for file in self.outputs[node_id]["images"]]

    def text(self, node_id: str) -> str:
        """The text that a node displays."""
        return "\n".join(self.outputs[node_id]["text"])

    def latent(self, node_id: str) -> np.ndarray:
        """The latent (batch, channels, H, W) that a TinyTestSaveLatent node saved, in float32."""
        (file,) = self.outputs[node_id]["latent"]
        return np.load(io.BytesIO(self.server.view(file)))


class ComfyServer:
    """Context manager that runs the ComfyUI checkout `comfyui`.

    base: base directory for custom_nodes, models, input, output, temp and user; existing content is kept.
    packs: folder name under custom_nodes -> the pack's folder, which is linked; no other pack is loaded.
    args: further options of ComfyUI's main.py.
    extra_model_paths: model folder name ('loras', ...) -> a further folder to search.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        packs: Mapping[str, Path],
        args: Sequence[str] = (),
        python: str = sys.executable,
        cpu: bool = True,
        extra_model_paths: Mapping[str, str] | None = None,
    ) -> None:
        self.base = base.resolve()
        self.log = self.base / "server.log"
        self.url = ""
        self._packs = packs
        self._command = [python, str(comfyui.resolve() / "main.py"), *(["--cpu"] if cpu else []), *args]
        self._extra_model_paths = extra_model_paths
        self._client_id = str(uuid.uuid4())
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, pack in self._packs.items():
            _link(self.base / "custom_nodes" / name, pack.resolve())
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        atexit.register(self._stop)
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._command, *self._options(port)],
                    cwd=self.base,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=os.name == "posix",
                )
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def object_info(self) -> dict[str, Any]:
        """Node type -> its definition, as sent to the frontend."""
        return self._json("/object_info")

    def submit(self, graph: Graph, workflow: Mapping[str, Any] | None = None) -> str:
        """Queue a graph in API format and return its prompt id. Raises PromptRejected if any node fails validation.

        ComfyUI itself rejects only graphs without any valid output; otherwise it skips the outputs that fail.

        workflow: the graph in the page's format, for nodes that embed it in files.
        """
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        try:
            answer = self._json("/prompt", {"prompt": graph, "client_id": self._client_id, "extra_data": extra})
        except urllib.error.HTTPError as rejection:
            if rejection.code != 400:
                raise
            answer = json.load(rejection)
            raise PromptRejected(answer["error"], answer["node_errors"]) from None
        if answer["node_errors"]:
            raise PromptRejected({"message": "Some outputs would be skipped.", "details": ""}, answer["node_errors"])
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> Result:
        """Wait for a queued prompt and return its result. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check_alive()
            if entry := self._json(f"/history/{prompt_id}").get(prompt_id):
                return self._result(entry)
            time.sleep(POLL_SECONDS)
        raise TimeoutError(f"The prompt did not finish within {timeout} s.\n{self._log_tail()}")

    def run(self, graph: Graph, timeout: float = 300) -> Result:
        """Submit a graph and wait for its result."""
        return self.wait(self.submit(graph), timeout)

    def interrupt(self) -> None:
        """Interrupt the running prompt; it stops at its next check."""
        self._request("/interrupt", {})

    def free(self) -> None:
        """Drop all cached results and unload all models before the next prompt."""
        self._request("/free", {"unload_models": True, "free_memory": True})

    def get(self, path: str) -> bytes:
        """The response body of a GET request to a path such as '/extensions'."""
        return self._request(path)

    def post(self, path: str, body: object) -> bytes:
        """The response body of a POST request with a JSON body to a path such as '/queue'."""
        return self._request(path, body)

    def put_input(self, name: str, image: Image.Image) -> str:
        """Save an image in the input folder for LoadImage; returns its name."""
        image.save(self.base / "input" / name)
        return name

    def put_workflow(self, name: str, workflow: Mapping[str, Any]) -> None:
        """Save a workflow in the user's workflow list."""
        file = self.base / "user" / "default" / "workflows" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(workflow), encoding="utf-8")

    def view(self, file: Mapping[str, str]) -> bytes:
        """The content of a {filename, subfolder, type} entry of an output."""
        query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
        return self._request(f"/view?{query}")

    def _options(self, port: int) -> list[str]:
        options = ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(self.base)]
        options += ["--database-url", "sqlite:///:memory:", "--disable-all-custom-nodes"]
        if self._packs:
            options += ["--whitelist-custom-nodes", *self._packs]
        if self._extra_model_paths:
            config = self.base / "extra_model_paths.yaml"
            config.write_text(json.dumps({"extra": dict(self._extra_model_paths)}), encoding="utf-8")
            options += ["--extra-model-paths-config", str(config)]
        return options

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            self._check_alive()
            try:
                self._request("/system_stats")
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s.\n{self._log_tail()}") from None
            time.sleep(POLL_SECONDS)
        if "(IMPORT FAILED)" in self.log.read_text(encoding="utf-8", errors="replace"):
            raise ServerError(f"A custom node pack could not be imported.\n{self._log_tail()}")

    def _check_alive(self) -> None:
        assert self._process is not None, "ComfyServer must be used inside its with block"
        if (code := self._process.poll()) is not None:
            raise ServerError(f"ComfyUI exited with status {code}.\n{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process, force=False)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            _signal_group(process, force=True)
            process.wait()

    def _request(self, path: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with _opener.open(request, timeout=60) as response:
            return response.read()

    def _json(self, path: str, body: object = None) -> dict[str, Any]:
        return json.loads(self._request(path, body))

    def _result(self, entry: Mapping[str, Any]) -> Result:
        messages: dict[str, dict[str, Any]] = dict(entry["status"]["messages"])
        graph, targets = entry["prompt"][2], entry["prompt"][4]
        failure = messages.get("execution_error") or messages.get("execution_interrupted")
        cached = set(messages.get("execution_cached", {"nodes": ()})["nodes"])
        return Result(
            server=self,
            ok=entry["status"]["status_str"] == "success",
            outputs=entry["outputs"],
            error=messages.get("execution_error"),
            interrupted="execution_interrupted" in messages,
            executed=set(failure["executed"]) - cached if failure else _needed(graph, targets, cached),
        )


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _needed(graph: Graph, targets: Sequence[str], cached: set[str]) -> set[str]:
    """The targets and all nodes they depend on, except cached nodes and what only those depend on."""
    needed: set[str] = set()
    pending = list(targets)
    while pending:
        node = pending.pop()
        if node in cached or node in needed:
            continue
        needed.add(node)
        links = graph[node]["inputs"].values()
        pending += [link[0] for link in links if isinstance(link, list) and len(link) == 2 and link[0] in graph]
    return needed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link(link: Path, target: Path) -> None:
    if link.exists() and link.samefile(target):
        return
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))  # a symlink would need administrator rights
    else:
        link.symlink_to(target, target_is_directory=True)


def _signal_group(process: subprocess.Popen[bytes], force: bool) -> None:
    """Signal the server and all processes that it started."""
    if sys.platform == "win32":
        if process.poll() is None:
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for an exited process
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)
