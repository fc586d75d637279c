"""What a node shows while it runs."""

from __future__ import annotations

import logging

import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from server import PromptServer

from ...slider_core.stable_flow.vitality_search import OnImage
from ...slider_core.types import OnStep


def previews(model: ModelPatcher, steps: int) -> OnStep:
    """A progress bar with the model's predicted image after each step."""
    return latent_preview.prepare_callback(model, steps)


def image_previews(model: ModelPatcher) -> OnImage:
    """A progress bar with the image that was generated last."""
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    bar = comfy.utils.ProgressBar(1)

    def on_image(done: int, total: int, latent: torch.Tensor) -> None:
        latent = model.model.latent_format.process_in(latent).to(model.load_device)
        bar.update_absolute(done, total, previewer and previewer.decode_latent_to_preview_image("JPEG", latent))

    return on_image


def show_text(node: type[io.ComfyNode], text: str) -> None:
    """Show text on a running node, and log it. The node's schema must request the hidden unique_id."""
    logging.info(text)
    if PromptServer.instance is not None and node.hidden.unique_id:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
