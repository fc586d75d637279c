"""Nodes of Stable Flow: edits that take what is not edited from the source, without training."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..slider_core.conditioning.active_region import ActiveRegion
from ..slider_core.stable_flow.vital_layers import inject_key_values
from ..slider_core.sweep import repeat_latent
from ..slider_core.text.batched_prompts import batch_prompts, split_prompts
from .common.layer_inputs import chosen_layers, injection_mask_input, layer_inputs, part_inputs, preservation_input
from .common.sockets import CATEGORY


def _guidance_input(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=3.5, min=0.0, max=100.0, step=0.1, tooltip=tooltip)


class StackPrompts(io.ComfyNode):
    """Encodes a source prompt and its edits as one batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersStackPrompts",
            display_name="Stack Prompts",
            category=CATEGORY,
            description="A source prompt and its edits as one conditioning: the first picture of the batch is the "
            "source, each further one an edit. Use it with Same Noise and Inject Vital Layers.",
            search_aliases=["stable flow", "parallel edit"],
            inputs=[
                io.Clip.Input("clip", tooltip="From DualCLIPLoader, type flux."),
                io.String.Input("source", multiline=True, default="a photo of a cat", tooltip="What the source shows."),
                io.String.Input(
                    "edits",
                    multiline=True,
                    default="a photo of a cat wearing a hat",
                    tooltip="One edited picture per line, each described in full.",
                ),
                _guidance_input(
                    "source_guidance", "FLUX guidance of the source. A FluxGuidance node after this one replaces both."
                ),
                _guidance_input("edit_guidance", "FLUX guidance of the edits."),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.Int.Output("images", tooltip="Number of prompts, for Same Noise."),
            ],
        )

    @classmethod
    def execute(
        cls, clip: CLIP, source: str, edits: str, source_guidance: float, edit_guidance: float
    ) -> io.NodeOutput:
        prompts = [source.strip(), *split_prompts(edits)]
        guidances = [source_guidance, *[edit_guidance] * (len(prompts) - 1)]
        return io.NodeOutput(batch_prompts(clip, prompts, guidances), len(prompts))


class SameNoise(io.ComfyNode):
    """Makes a latent batch in which every picture starts from the same noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSameNoise",
            display_name="Same Noise",
            category=CATEGORY,
            description="Repeats a latent and lets all copies start from the same noise.",
            search_aliases=["repeat latent same noise", "stable flow"],
            inputs=[
                io.Latent.Input("latent", tooltip="One latent image."),
                io.Int.Input("images", default=2, min=1, max=256, tooltip="Number of copies, from Stack Prompts."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent: dict, images: int) -> io.NodeOutput:
        return io.NodeOutput(repeat_latent(latent, images))


class InjectVitalLayers(io.ComfyNode):
    """Lets the edits of a batch keep what the source shows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersInjectVitalLayers",
            display_name="Inject Vital Layers",
            category=CATEGORY,
            description="In the layers that shape the picture most, every picture of the batch takes keys and values "
            "from the reference picture, so that what the prompts do not change stays the same.",
            search_aliases=["stable flow", "key value injection", "consistent edit"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 dev."),
                *layer_inputs(),
                io.Int.Input(
                    "reference",
                    default=0,
                    min=0,
                    max=255,
                    advanced=True,
                    tooltip="Picture of the batch that the others take from, counted from 0.",
                ),
                preservation_input(),
                *part_inputs(),
                io.Boolean.Input(
                    "chain",
                    default=False,
                    advanced=True,
                    optional=True,
                    tooltip="Every picture takes from the one before it instead of from the reference: a chain of "
                    "edits, each on top of the last.",
                ),
                injection_mask_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        layers: str,
        list: str,
        reference: int,
        preservation: float,
        start: float,
        end: float,
        chain: bool = False,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        chosen, region = chosen_layers(model, layers, list), ActiveRegion(mask, start, end)
        return io.NodeOutput(inject_key_values(model, chosen, reference, preservation, region, chain))
