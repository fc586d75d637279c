"""Nodes that look into the model: how vital its layers are, and where attention goes."""

from __future__ import annotations

import folder_paths
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..slider_core.figures.plots import check_matplotlib
from ..slider_core.sampling.sampling_settings import SamplingSettings
from ..slider_core.stable_flow.attention_maps import measure_attention
from ..slider_core.stable_flow.stable_flow_plots import attention_plot, vitality_plot
from ..slider_core.stable_flow.vital_layers import block_count
from ..slider_core.stable_flow.vitality_search import (
    RenderPlan,
    check_block_count,
    choose_features,
    encode_prompts,
    measure_vitality,
)
from ..slider_core.types import Conditioning
from .common.latents import fitting_latent, noise_for
from .common.layer_inputs import chosen_layers, layer_inputs
from .common.progress import previews, previews_of_pictures
from .common.sockets import CATEGORY, seed_input

MOST_VITAL, ABOVE = "the most vital", "above the threshold"
PROMPTS = "a photo of a dog in the park\na watercolor of a lighthouse\na man holding a sign that says hello"


class FindVitalLayers(io.ComfyNode):
    """Leaves out each layer in turn and measures what changes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersFindVitalLayers",
            display_name="Find Vital Layers",
            category=CATEGORY,
            description="Renders prompts without each layer in turn and compares with the whole model's pictures. "
            "Takes long: one picture per layer, prompt and seed. An interrupted run goes on where it stopped.",
            search_aliases=["stable flow", "layer analysis", "vitality", "layer bypass"],
            inputs=[
                io.Model.Input("model", tooltip="The model to look into."),
                io.Clip.Input("clip", tooltip="From DualCLIPLoader, type flux."),
                io.Latent.Input("latent", tooltip="One empty latent: the size of the pictures."),
                io.String.Input("prompts", multiline=True, default=PROMPTS, tooltip="One per line. The paper used 64."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The first one.",
                ),
                io.Int.Input("seeds", default=1, min=1, max=64, tooltip="Pictures per prompt."),
                io.Int.Input("steps", default=15, min=1, max=1000, tooltip="Of every picture. The paper: 15."),
                io.Float.Input("guidance", default=3.5, min=0.0, max=100.0, step=0.1, tooltip="The paper: 3.5."),
                io.Combo.Input(
                    "choose", options=[MOST_VITAL, ABOVE], tooltip="Which layers are given out as the vital ones."
                ),
                io.Int.Input("count", default=10, min=1, max=1000, tooltip="For 'the most vital': how many."),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=-1.0,
                    max=2.0,
                    step=0.001,
                    tooltip="For 'above the threshold': vitality, 1 - similarity.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="vital_layers/scores",
                    advanced=True,
                    tooltip="Where in the output folder the scores are kept while it runs. Other settings get another "
                    "file.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the pictures for clip_vision."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Compares the pictures: DINOv2 as in the paper, CLIP or SigLIP. Without it latents are "
                    "compared, which is coarser.",
                ),
                io.Latent.Input(
                    "reference",
                    optional=True,
                    tooltip="For models that edit, like Kontext: what is edited. The prompts are then instructions.",
                ),
            ],
            outputs=[
                io.String.Output("layers", tooltip="For 'list' of Inject Vital Layers."),
                io.String.Output("scores", tooltip="Vitality and all similarities, as JSON."),
                io.Image.Output("plot", tooltip="Similarity by layer, as in the paper's figure 4."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        latent: dict,
        prompts: str,
        seed: int,
        seeds: int,
        steps: int,
        guidance: float,
        choose: str,
        count: int,
        threshold: float,
        filename_prefix: str,
        vae: VAE | None = None,
        clip_vision: ClipVisionModel | None = None,
        reference: dict | None = None,
    ) -> io.NodeOutput:
        check_matplotlib()
        if choose == MOST_VITAL:
            check_block_count(count, block_count(model))
        features = choose_features(vae, clip_vision)
        conditionings = encode_prompts(clip, prompts, guidance, reference and reference["samples"])
        plan = RenderPlan(conditionings, range(seed, seed + seeds), fitting_latent(model, latent), steps)
        folder, name, *_ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        settings = {"guidance": guidance, "compared by": features.name}
        scores = measure_vitality(model, plan, features, f"{folder}/{name}", settings, previews_of_pictures(model))
        chosen = scores.most_vital(count) if choose == MOST_VITAL else scores.above(threshold)
        return io.NodeOutput(", ".join(map(str, chosen)), scores.as_json(), vitality_plot(scores, chosen))


class ViewAttention(io.ComfyNode):
    """Shows where a point of a picture looks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersViewAttention",
            display_name="View Attention",
            category=CATEGORY,
            description="Samples as KSampler does (cfg 1, euler, simple) and shows how much attention a point of the "
            "picture pays to the text and to the rest of the picture, in vital and other layers.",
            search_aliases=["stable flow", "attention map"],
            inputs=[
                io.Model.Input("model", tooltip="With or without Inject Vital Layers. Not compiled."),
                io.Conditioning.Input("conditioning", tooltip="A prompt, or several from Stack Prompts."),
                io.Latent.Input("latent", tooltip="An empty latent, or several from Same Noise."),
                io.Vae.Input("vae", tooltip="To show the picture."),
                seed_input("Of the noise."),
                io.Int.Input("steps", default=15, min=1, max=1000, tooltip="The attention is their mean."),
                io.Int.Input("picture", default=0, min=0, max=255, tooltip="Of the batch, counted from 0."),
                io.Float.Input(
                    "across",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="The point: 0 = left edge, 1 = right edge.",
                ),
                io.Float.Input(
                    "down",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="The point: 0 = upper edge, 1 = lower edge.",
                ),
                *layer_inputs(),
            ],
            outputs=[
                io.Image.Output("plot", tooltip="The point, its attention maps, and the share of text by layer."),
                io.Latent.Output(tooltip="What was sampled."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        conditioning: Conditioning,
        latent: dict,
        vae: VAE,
        seed: int,
        steps: int,
        picture: int,
        across: float,
        down: float,
        layers: str,
        list: str,
    ) -> io.NodeOutput:
        check_matplotlib()
        vital, point = chosen_layers(model, layers, list), (across, down)
        empty, noise = fitting_latent(model, latent), noise_for(model, latent, seed)
        attention, samples = measure_attention(
            model, conditioning, empty, noise, SamplingSettings(steps, seed), picture, point, previews(model, steps)
        )
        shown: torch.Tensor = vae.decode(samples[picture : picture + 1])[0]
        return io.NodeOutput(attention_plot(attention, shown, point, vital), {"samples": samples})
