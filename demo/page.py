"""The HTML page of the demo's images."""

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
<p>Strength 0 is the source image, 1 the full edit; above 1 the edit is exaggerated. The same graph in the browser:
<code>python run.py demo --open</code></p>
{sections}
</html>
"""


class Figure(NamedTuple):
    """An image in the page's folder, with its heading and caption."""

    heading: str
    caption: str
    file: Path


def write_page(file: Path, figures: Sequence[Figure]) -> Path:
    sections = (
        f'<h2>{escape(figure.heading)}</h2>\n<p>{escape(figure.caption)}</p>\n<img src="{escape(figure.file.name)}" '
        f'alt="{escape(figure.caption)}">'
        for figure in figures
    )
    file.write_text(_PAGE.format(sections="\n".join(sections)), encoding="utf-8")
    return file
