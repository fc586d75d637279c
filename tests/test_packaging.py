"""pyproject.toml agrees with run.py and requirements.txt, and README.md quotes the messages of the sources."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(run.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_dev_extra_lists_the_tools_of_run_py():
    assert PROJECT["optional-dependencies"]["dev"] == list(run.TOOLS)


def test_dependencies_equal_requirements_txt():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line.partition("#")[0].strip() for line in lines]
    assert PROJECT["dependencies"] == [requirement for requirement in requirements if requirement]


def test_troubleshooting_quotes_present_messages():
    """Every fragment quoted in README.md's table (quotes are split at "...") occurs in the sources."""
    files = [path for folder in ("slider_core", "nodes", "web", "locales") for path in (ROOT / folder).rglob("*")]
    code = "\n".join(path.read_text("utf-8") for path in files if path.suffix in (".py", ".js", ".mjs", ".json"))
    sources = re.sub(r'"\s*\n\s*f?"', "", code)  # joins string literals that continue on the next line
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Troubleshooting")[2].partition("\n## ")[0]
    quotes = [quote for row in table.splitlines() if row for quote in re.findall('"(.+?)"', row.split("|")[1])]
    fragments = [fragment for quote in quotes for fragment in quote.split("...") if fragment]
    assert fragments
    assert [fragment for fragment in fragments if fragment not in sources] == []
