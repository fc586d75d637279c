"""Shared setup: ComfyUI on sys.path and on the CPU, a server for complete graphs, the golden model for single calls."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, expect

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "data" / "golden"
if "COMFYUI_PATH" not in os.environ:
    pytest.exit("COMFYUI_PATH is not set: run the tests with 'python run.py test', or set it to a ComfyUI checkout.")
COMFYUI = Path(os.environ["COMFYUI_PATH"])

sys.path[:0] = [str(COMFYUI), str(REPO / "tests")]
sys.path.append(str(REPO))

import comfy.cli_args  # noqa: E402
from support.browser import ComfyPage, browser, write_settings  # noqa: E402
from support.comfy_server import ComfyServer  # noqa: E402
from support.screenshots import QUALITY, look_alike  # noqa: E402
from support.tiny_models import write_tiny_models  # noqa: E402

# One thread here and in the servers unless OMP_NUM_THREADS sets more: the models are too small to gain from threads.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
comfy.cli_args.args.cpu = True
comfy.cli_args.args.use_pytorch_cross_attention = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--redraw", action="store_true", help="overwrite the images of README, help pages and templates")


@pytest.fixture(scope="session")
def assert_up_to_date(request: pytest.FixtureRequest) -> Callable[[Path, Image.Image], None]:
    """Asserts that an image file of the repository looks like a new screenshot; --redraw overwrites the file first."""

    def check(file: Path, screenshot: Image.Image) -> None:
        if request.config.getoption("--redraw"):
            screenshot.save(file, quality=QUALITY)
        with Image.open(file) as saved:
            assert look_alike(saved, screenshot), f"{file.name} is out of date: python run.py test --redraw"

    return check


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked newer_frontend_too run on the bundled and on a newer frontend."""
    if "frontend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("newer_frontend_too")
        frontends = ["bundled", "newer"] if marker else ["bundled"]
        metafunc.parametrize("frontend", frontends, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, mark in (("chromium", "page"), ("server", "server")):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)


@pytest.fixture(scope="session")
def frontend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def server(frontend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack, the tiny models and an input image photo.png."""
    base = tmp_path_factory.mktemp("comfyui")
    write_tiny_models(base / "models")
    write_settings(base)
    packs = {"ComfyUI-EditSliders": REPO, "tiny_loaders": REPO / "tests" / "support" / "tiny_loaders"}
    args = ["--preview-method", "latent2rgb"]
    if frontend == "newer":
        args += ["--front-end-root", os.environ["EDITSLIDERS_NEWER_FRONTEND"]]
    with pytest.MonkeyPatch.context() as monkeypatch:
        # torchvision's weights come from here, not from the user's cache
        monkeypatch.setenv("TORCH_HOME", str(base / "torch"))
        with ComfyServer(COMFYUI, base, packs, args) as running:
            running.put_input("photo.png", Image.open(REPO / "demo" / "photo.jpg").resize((64, 64)))
            yield running


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)  # milliseconds; a busy or slow machine takes longer than the default of 5000
    with browser() as running:
        yield running


@pytest.fixture(scope="session", params=["canvas", "nodes 2.0"])
def view(request: pytest.FixtureRequest, server: ComfyServer, chromium: Browser) -> Iterator[ComfyPage]:
    """The server's page in a browser, with each of the frontend's node renderers."""
    page = ComfyPage(chromium, server, vue=request.param == "nodes 2.0")
    yield page
    page.close()


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def manifest() -> dict:
    return json.loads((GOLDEN / "manifest.json").read_text())


@pytest.fixture(scope="session")
def golden_model(recipe: ModuleType, manifest: dict):
    """The golden FLUX as the stock loader returns it: a ModelPatcher in float32 on the CPU."""
    import comfy.sd

    weights = recipe.flux_weights(manifest["model"])
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})


@pytest.fixture
def unpatch_golden_model(golden_model) -> Iterator[None]:
    """Restores the golden model's weights after a test in which ComfyUI merged LoRAs into them."""
    import comfy.model_management

    yield
    comfy.model_management.load_model_gpu(golden_model)
