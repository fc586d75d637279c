"""Nodes of Stable Flow: edits that keep what is not edited from the source, without training."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.conditioning.active_region import ActiveRegion
from ..slider_core.stable_flow.vital_layers import inject_key_values
from ..slider_core.sweep import repeat_latent
from ..slider_core.text.batched_prompts import batch_prompts, split_prompts
from .common import categories
from .common.inputs import (
    clip_input,
    edit_prompts_input,
    end_input,
    guidance_input,
    injection_mask_input,
    injection_strength_input,
    layer_inputs,
    parse_layers,
    start_input,
)


class BatchPrompts(io.ComfyNode):
    """Encodes a source prompt and its edit prompts as one batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersStackPrompts",
            display_name=names.BATCH_PROMPTS,
            category=categories.STABLE_FLOW,
            description="Encodes a source prompt and its edit prompts as one conditioning: the first image of the "
            f"batch is the source, each additional image an edit. Use it with {names.REPEAT_LATENT_SAME_NOISE} and "
            f"{names.KEEP_SOURCE}.",
            search_aliases=["stack prompts", "parallel edit"],
            inputs=[
                clip_input(),
                io.String.Input(
                    "source",
                    display_name="source_prompt",
                    multiline=True,
                    default="a photo of a cat",
                    tooltip="A prompt that describes the source.",
                ),
                edit_prompts_input(),
                guidance_input(
                    "source_guidance",
                    "FLUX guidance of the source. A FluxGuidance node after this one overrides both guidance values.",
                ),
                guidance_input("edit_guidance", "FLUX guidance of the edits."),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.Int.Output(
                    "images",
                    display_name="num_images",
                    tooltip=f"Number of prompts, for {names.REPEAT_LATENT_SAME_NOISE}.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, clip: CLIP, source: str, edits: str, source_guidance: float, edit_guidance: float
    ) -> io.NodeOutput:
        prompts = [source.strip(), *split_prompts(edits)]
        guidances = [source_guidance, *[edit_guidance] * (len(prompts) - 1)]
        return io.NodeOutput(batch_prompts(clip, prompts, guidances), len(prompts))


class RepeatLatentSameNoise(io.ComfyNode):
    """Makes a latent batch in which every image starts from the same noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSameNoise",
            display_name=names.REPEAT_LATENT_SAME_NOISE,
            category=categories.STABLE_FLOW,
            description="Repeats a latent so that all copies start from the same noise.",
            search_aliases=["same noise", "stable flow"],
            inputs=[
                io.Latent.Input("latent", tooltip="One latent image."),
                io.Int.Input(
                    "images",
                    display_name="num_images",
                    default=2,
                    min=1,
                    max=256,
                    tooltip=f"Number of copies, from {names.BATCH_PROMPTS}.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent: dict, images: int) -> io.NodeOutput:
        return io.NodeOutput(repeat_latent(latent, images))


class KeepSource(io.ComfyNode):
    """Injects the source's keys and values into the edits of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersInjectVitalLayers",
            display_name=names.KEEP_SOURCE,
            category=categories.STABLE_FLOW,
            description="In the layers that shape the image most, every image of the batch uses the keys and values of "
            "the source, so that what the prompts do not change stays the same.",
            search_aliases=["inject vital layers", "key value injection", "consistent edit"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 dev."),
                *layer_inputs(),
                io.Int.Input(
                    "reference",  # this id is in saved workflows
                    display_name="source_index",
                    default=0,
                    min=0,
                    max=255,
                    advanced=True,
                    tooltip="Index of the source in the batch, counted from 0.",
                ),
                injection_strength_input(),
                start_input(advanced=True),
                end_input(advanced=True),
                io.Boolean.Input(
                    "chain",
                    default=False,
                    advanced=True,
                    optional=True,
                    tooltip="Each image uses the keys and values of the image before it instead of the source's: a "
                    "chain of edits, each based on the last.",
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
        blocks, region = parse_layers(model, layers, list), ActiveRegion(mask, start, end)
        return io.NodeOutput(inject_key_values(model, blocks, reference, preservation, region, chain))


NODES: list[type[io.ComfyNode]] = [BatchPrompts, RepeatLatentSameNoise, KeepSource]
