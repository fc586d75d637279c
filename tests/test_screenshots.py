"""The images of templates and README show the page as it is now."""

from __future__ import annotations

from conftest import COMFYUI
from support.screenshots import take_screenshots


def test_thumbnails_and_overview_are_up_to_date(tmp_path, chromium, assert_up_to_date):
    for file, screenshot in take_screenshots(COMFYUI, tmp_path, chromium):
        assert_up_to_date(file, screenshot)
