"""pyproject.toml repeats what run.py and requirements.txt list."""

from __future__ import annotations

import sys
from pathlib import Path

import run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(run.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_extra_dev_lists_the_tools_of_run_py():
    assert PROJECT["optional-dependencies"]["dev"] == list(run.TOOLS)


def test_dependencies_and_requirements_txt_are_the_same():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line.partition("#")[0].strip() for line in lines]
    assert PROJECT["dependencies"] == [one for one in requirements if one]
