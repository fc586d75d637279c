"""The graphs behind the demo's pictures, in ComfyUI's API format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models import Models

PICTURE = "picture"
MINIATURE_STEPS = 12
MINIATURE_VITAL_LAYERS = "0, 2, 4"  # found by: python -m training.miniature layers
STEPS = 20

Node = dict[str, Any]
Graph = dict[str, Node]


def edit_graph(models: Models, photo: str, instructions: Sequence[str], strengths: Sequence[float]) -> Graph:
    """Edit an input picture by sub-instructions, each at its strength; the node PICTURE shows the result."""
    return {
        **_picture_and_models(models, photo),
        "adapter": _node("EditSlidersLoadAdapter", adapter_name=models.adapter),
        "slider_model": _node("EditSlidersApplySTLoRA", model=["model", 0], adapter=["adapter", 0]),
        "prompt": _node(
            "EditSlidersEncodeSubInstructions",
            clip=["clip", 0],
            text="\n".join(instructions),
            mode="one per line",
            pad_to_512=not models.miniature,
        ),
        "strengths": _node(
            "EditSlidersSubInstructionStrengths",
            conditioning=["prompt", 0],
            **{f"strength_{k}": strength for k, strength in enumerate(strengths, 1)},
        ),
        **_sampled(models, "slider_model", "strengths"),
    }


def parallel_graph(models: Models, photo: str, edits: Sequence[str]) -> Graph:
    """The source and its edits in one batch, without an adapter; the node PICTURE shows all of them."""
    graph = {
        **_picture_and_models(models, photo),
        "injected": _node(
            "EditSlidersInjectVitalLayers",
            model=["model", 0],
            layers="listed below",
            list=MINIATURE_VITAL_LAYERS,
            reference=0,
            preservation=1.0,
            start=0.0,
            end=1.0,
        ),
        "prompts": _node(
            "EditSlidersStackPrompts",
            clip=["clip", 0],
            source="keep the image the same",
            edits="\n".join(edits),
            source_guidance=3.5,
            edit_guidance=3.5,
        ),
        **_sampled(models, "injected", "prompts"),
        "same_noise": _node("EditSlidersSameNoise", latent=["source", 0], images=["prompts", 1]),
    }
    graph["sampled"]["inputs"]["latent_image"] = ["same_noise", 0]
    return graph


def _picture_and_models(models: Models, photo: str) -> Graph:
    loaded = {
        "photo": _node("LoadImage", image=photo),
        "model": _node("UNETLoader", unet_name=models.model, weight_dtype="default"),
        "vae": _node("VAELoader", vae_name=models.vae),
    }
    encoders = {"clip_l": models.clip_l, "t5xxl": models.t5xxl}
    if models.miniature:
        return {
            **loaded,
            "clip": _node("SmallTextEncoders", rows=32, **encoders),
            "source": _node("VAEEncode", pixels=["photo", 0], vae=["vae", 0]),
        }
    return {
        **loaded,
        "clip": _node("DualCLIPLoader", clip_name1=models.clip_l, clip_name2=models.t5xxl, type="flux"),
        "scaled": _node("FluxKontextImageScale", image=["photo", 0]),
        "source": _node("VAEEncode", pixels=["scaled", 0], vae=["vae", 0]),
    }


def _sampled(models: Models, model: str, conditioning: str) -> Graph:
    return {
        "reference": _node("ReferenceLatent", conditioning=[conditioning, 0], latent=["source", 0]),
        "guided": _node("FluxGuidance", conditioning=["reference", 0], guidance=3.5 if models.miniature else 2.5),
        "sampled": _node(
            "KSampler",
            model=[model, 0],
            positive=["guided", 0],
            negative=["guided", 0],
            latent_image=["source", 0],
            seed=0,
            steps=MINIATURE_STEPS if models.miniature else STEPS,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decoded": _node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        PICTURE: _node("PreviewImage", images=["decoded", 0]),
    }


def _node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}
