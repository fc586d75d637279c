"""Nodes that analyze the model: how vital each layer is, and what attention attends to."""

from __future__ import annotations

import folder_paths
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.figures.plots import attention_plot, check_matplotlib, vitality_plot
from ..slider_core.sampling.sampling_settings import SamplingSettings
from ..slider_core.stable_flow.attention_maps import measure_attention
from ..slider_core.stable_flow.vital_layers import block_count
from ..slider_core.stable_flow.vitality_search import (
    RenderPlan,
    check_block_count,
    choose_features,
    encode_prompts,
    measure_vitality,
)
from ..slider_core.types import Conditioning
from .common import categories
from .common.inputs import (
    clip_input,
    fraction_input,
    guidance_input,
    layer_inputs,
    parse_layers,
    seed_input,
    steps_input,
)
from .common.latents import noise_for, prepare_latent
from .common.progress import image_previews, previews

MOST_VITAL, ABOVE = "the most vital", "above the threshold"
PROMPTS = "a photo of a dog in the park\na watercolor of a lighthouse\na man holding a sign that says hello"


class FindVitalLayers(io.ComfyNode):
    """Bypasses each layer in turn and measures how much the images change."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersFindVitalLayers",
            display_name=names.FIND_VITAL_LAYERS,
            category=categories.ANALYSIS,
            description="Generates images without each layer in turn and compares them with the images of the complete "
            "model. This takes long: one image per layer, prompt and seed. An interrupted run continues where it "
            "stopped.",
            search_aliases=["stable flow", "layer analysis", "vitality", "layer bypass"],
            inputs=[
                io.Model.Input("model", tooltip="The model to analyze."),
                clip_input(),
                io.Latent.Input("latent", tooltip="One empty latent, which sets the image size."),
                io.String.Input(
                    "prompts", multiline=True, default=PROMPTS, tooltip="One prompt per line. The paper used 64."
                ),
                seed_input("Noise seed of the first image per prompt.", maximum=0xFFFFFFFF),
                io.Int.Input(
                    "seeds", display_name="num_seeds", default=1, min=1, max=64, tooltip="Number of seeds per prompt."
                ),
                steps_input("Sampling steps per image. The paper used 15."),
                guidance_input("guidance", "FLUX guidance. The paper used 3.5."),
                io.Combo.Input(
                    "choose",
                    display_name="selection",
                    options=[MOST_VITAL, ABOVE],
                    tooltip="Which layers the output 'layers' lists.",
                ),
                io.Int.Input(
                    "count",
                    display_name="top_k",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="For 'the most vital': the number of layers.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=-1.0,
                    max=2.0,
                    step=0.001,
                    tooltip="For 'above the threshold': the lowest vitality, 1 - similarity.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="vital_layers/scores",
                    advanced=True,
                    tooltip="Where the scores are saved in the output folder during the run. Other settings are saved "
                    "to another file.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the images for clip_vision."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Compares images by their features: DINOv2 as in the paper, CLIP or SigLIP. Without it, "
                    "latents are compared, which is less precise.",
                ),
                io.Latent.Input(
                    "reference",
                    display_name="reference_latent",
                    optional=True,
                    tooltip="For edit models such as Kontext: the image to edit. The prompts are then instructions.",
                ),
            ],
            outputs=[
                io.String.Output("layers", tooltip=f"For layer_list of {names.KEEP_SOURCE}."),
                io.String.Output("scores", tooltip="Vitality and all similarities as JSON."),
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
        plan = RenderPlan(conditionings, range(seed, seed + seeds), prepare_latent(model, latent), steps)
        folder, name, *_ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        settings = {"guidance": guidance, "compared by": features.name}
        scores = measure_vitality(model, plan, features, f"{folder}/{name}", settings, image_previews(model))
        selected = scores.most_vital(count) if choose == MOST_VITAL else scores.above(threshold)
        plot = vitality_plot(scores.mean_similarities(), selected, scores.describe())
        return io.NodeOutput(", ".join(map(str, selected)), scores.as_json(), plot)


class AttentionMap(io.ComfyNode):
    """Plots the attention of one point of an image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersViewAttention",
            display_name=names.ATTENTION_MAP,
            category=categories.ANALYSIS,
            description="Samples as KSampler does (cfg 1, euler, simple) and plots how much attention a point of the "
            "image pays to the text and to the rest of the image, in vital and in other layers.",
            search_aliases=["view attention", "stable flow"],
            inputs=[
                io.Model.Input(
                    "model", tooltip=f"With or without {names.KEEP_SOURCE}. Does not work with torch.compile."
                ),
                io.Conditioning.Input("conditioning", tooltip=f"A prompt, or several from {names.BATCH_PROMPTS}."),
                io.Latent.Input(
                    "latent", tooltip=f"An empty latent, or several from {names.REPEAT_LATENT_SAME_NOISE}."
                ),
                io.Vae.Input("vae", tooltip="Decodes the image for the plot."),
                seed_input(),
                steps_input("Sampling steps. The attention is averaged over them."),
                io.Int.Input(
                    "picture",  # this id is in saved workflows
                    display_name="batch_index",
                    default=0,
                    min=0,
                    max=255,
                    tooltip="Index of the image in the batch, counted from 0.",
                ),
                fraction_input(
                    "across",
                    "Horizontal position of the point: 0 = left edge, 1 = right edge.",
                    default=0.5,
                    display_name="x",
                    slider=True,
                ),
                fraction_input(
                    "down",
                    "Vertical position of the point: 0 = top edge, 1 = bottom edge.",
                    default=0.5,
                    display_name="y",
                    slider=True,
                ),
                *layer_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    "plot", tooltip="The point, its attention maps, and its attention to the text by layer."
                ),
                io.Latent.Output(tooltip="The sampled latent."),
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
        vital, point = parse_layers(model, layers, list), (across, down)
        empty, noise = prepare_latent(model, latent), noise_for(model, latent, seed)
        attention, samples = measure_attention(
            model, conditioning, empty, noise, SamplingSettings(steps, seed), picture, point, previews(model, steps)
        )
        image: torch.Tensor = vae.decode(samples[picture : picture + 1])[0]
        return io.NodeOutput(attention_plot(attention, image, point, vital), {"samples": samples})


NODES: list[type[io.ComfyNode]] = [FindVitalLayers, AttentionMap]
