"""ComfyUI-EditSliders: a real slider for every edit."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .nodes import NODES
from .nodes.server_routes import add_routes

WEB_DIRECTORY = "./web"


class EditSliders(ComfyExtension):
    async def on_load(self) -> None:
        add_routes(PromptServer.instance.routes)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> EditSliders:
    return EditSliders()
