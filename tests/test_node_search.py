"""Which node ComfyUI's node search lists first for the words users type; a double click on the canvas opens it.

The search ranks by how a node's id or display name resembles the query, then by how common the node is in public
workflows, and last by its search_aliases: an alias alone wins only where no stock node's name resembles the query.
"""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from slider_core import node_names as names

FIRST = {
    "strength": names.INSTRUCTION_STRENGTHS,
    "edit strength": names.SLIDER_PROMPT,
    "intensity": names.SLIDER_PROMPT,
    "how strong": names.SLIDER_PROMPT,
    "slider": names.SLIDER_PROMPT,
    "lora strength": names.SLIDER_PROMPT,
    "live": names.SLIDER_PROMPT,
    "stlora": names.APPLY_STLORA,
    "gstlora": names.APPLY_GSTLORA,
    "veloedit": names.VELOCITY_BLENDING,
    "flowslider": names.FLOWSLIDER,
    "stable flow": names.KEEP_SOURCE,
    "where and when": names.MASK_AND_SCHEDULE,
    "kontext": "Kontext Slider Edit",  # the subgraph blueprint
}


@pytest.mark.newer_frontend_too
def test_the_search_lists_the_right_node_first(view):
    listed = view.page.get_by_test_id("result-item")
    view.open({"nodes": [], "links": [], "version": 0.4})
    view.page.mouse.dblclick(800, 450)
    listed.first.wait_for()  # the most common nodes, so the page has loaded how common each is
    for query, node in FIRST.items():
        view.page.locator("[role=combobox][aria-controls=results-list]").fill(query)
        expect(listed.first.locator("span.truncate").first, query).to_have_text(node)
    view.page.keyboard.press("Escape")
    listed.first.wait_for(state="hidden")
