"""The pictures of templates and README are what the page shows."""

from __future__ import annotations

from conftest import COMFYUI
from support.pictures import drawn


def test_thumbnails_and_overview(tmp_path, chromium, same_or_redrawn):
    for place, picture in drawn(COMFYUI, tmp_path, chromium):
        same_or_redrawn(place, picture)
