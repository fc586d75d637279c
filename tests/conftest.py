"""ComfyUI on the path, on the CPU where the machine has no accelerator; fixtures for the golden model."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "data" / "golden"
COMFYUI = Path(os.environ["COMFYUI_PATH"])

sys.path[:0] = [str(COMFYUI), str(REPO / "tests")]
sys.path.append(str(REPO))

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True
comfy.cli_args.args.use_pytorch_cross_attention = True


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
    """The golden FLUX as the stock loader makes it: a ModelPatcher, float32 on the CPU."""
    import comfy.sd

    weights = recipe.flux_weights(manifest["model"])
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
