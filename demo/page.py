"""A page that shows what the demo has drawn."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Edit Sliders</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }}
img {{ max-width: 100% }}
code {{ background: #eee; padding: .2em .4em }}
</style>
<h1>Edit Sliders</h1>
<p>0 is the source, 1 the full edit; above 1 it is exaggerated. The same graph in the browser:
<code>python run.py demo --open</code></p>
{sections}
</html>
"""


class Shown(NamedTuple):
    """A picture beside the page, with its heading and what was asked."""

    heading: str
    told: str
    file: Path


def write_page(file: Path, shown: Sequence[Shown]) -> Path:
    sections = (
        f'<h2>{escape(one.heading)}</h2>\n<p>{escape(one.told)}</p>\n<img src="{escape(one.file.name)}" '
        f'alt="{escape(one.told)}">'
        for one in shown
    )
    file.write_text(_PAGE.format(sections="\n".join(sections)), encoding="utf-8")
    return file
