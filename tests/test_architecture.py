"""The rules that keep the folders apart, checked from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

LAYERS = (
    {"metrics", "figures"},
    {"families"},
    {"patching"},
    {"conditioning"},
    {"text"},
    {"sampling"},
    {"adapters", "training_free", "stable_flow"},
)
"""Folders of slider_core, lowest first. A folder may import those below it, and none beside or above it."""

FORBIDDEN = {"slider_core": {"nodes", "training"}, "training": {"nodes"}, "nodes": {"training"}}
"""Top-level packages that each of ours must not import."""


def imports_of(source: str, module: str) -> set[str]:
    """Dotted names of everything that a module imports, relative imports resolved."""
    package = module.split(".")[:-1]
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            imported |= {f"{base}.{alias.name}" for alias in node.names}
    return imported


def files(top: str) -> dict[str, str]:
    """Module name -> source, of every file of a top-level package."""
    paths = [path for path in (REPO / top).rglob("*.py") if "node_modules" not in path.parts]
    return {".".join(path.relative_to(REPO).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}


def allowed_folders(folder: str) -> set[str]:
    """Folders that files of `folder` may import; none for the files directly in slider_core."""
    for k, layer in enumerate(LAYERS):
        if folder in layer:
            return {folder}.union(*LAYERS[:k])
    return set()


def violations(modules: dict[str, str]) -> list[str]:
    """Imports in slider_core against the rule, as 'module imports folder'."""
    folders = {path.name for path in (REPO / "slider_core").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set().union(*LAYERS), "a folder of slider_core has no place in the layers"
    found = []
    for module, source in modules.items():
        own = module.split(".")[1]
        for name in imports_of(source, module):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top == "slider_core" and other in folders - allowed_folders(own):
                found.append(f"{module} imports {other}")
    return sorted(found)


def test_folders_import_only_what_is_below_them():
    assert violations(files("slider_core")) == []


@pytest.mark.parametrize(
    ("module", "line", "violation"),
    [
        (
            "slider_core.patching.new",
            "from ..conditioning import masks",
            "slider_core.patching.new imports conditioning",
        ),
        (
            "slider_core.adapters.new",
            "from ..stable_flow.inversion import invert",
            "slider_core.adapters.new imports stable_flow",
        ),
        ("slider_core.metrics.new", "from ..families import family_of", "slider_core.metrics.new imports families"),
        ("slider_core.new", "from .text.encode import encode_prompt", "slider_core.new imports text"),
        ("slider_core.text.new", "import slider_core.sampling.flow_matching", "slider_core.text.new imports sampling"),
    ],
)
def test_an_import_against_the_rule_is_noticed(module, line, violation):
    assert violations({module: line}) == [violation]


@pytest.mark.parametrize("top", FORBIDDEN)
def test_packages_do_not_import_upwards(top):
    for module, source in files(top).items():
        tops = {name.partition(".")[0] for name in imports_of(source, module)}
        if module == "training.sample_cache":
            tops -= {"nodes"}  # ComfyUI's own module of that name
        assert not tops & FORBIDDEN[top], module


def test_only_one_file_spells_keys():
    """Keys in conditionings, model_conds and transformer_options are the constants of slider_core/keys.py."""
    spelled = {
        module
        for module, source in files("slider_core").items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("edit_sliders")
    }
    assert spelled == {"slider_core.keys"}


def test_private_names_stay_in_their_file():
    for top in ("slider_core", "nodes", "training"):
        for module, source in files(top).items():
            private = {name for name in imports_of(source, module) if name.rpartition(".")[2].startswith("_")}
            ours = {
                name for name in private if name.startswith(("slider_core", "nodes", "training")) and "__" not in name
            }
            assert not ours, module
