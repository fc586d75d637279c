"""The graph behind the strip, in ComfyUI's API format."""

from __future__ import annotations

from typing import Any

from models import Models

PICTURE = "picture"
TINY_STEPS = 8
TINY_FIRST_STEP = 5  # the photograph itself is the start, without noise, so that it stays recognisable
STEPS = 20

Node = dict[str, Any]


def strip_graph(models: Models, photo: str, instruction: str, strength: float) -> dict[str, Node]:
    """Edit an input picture with one sub-instruction at one strength; the node PICTURE shows the result."""
    loaders = _tiny_loaders(models) if models.tiny else _loaders(models)
    return {
        "photo": _node("LoadImage", image=photo),
        **loaders,
        "adapter": _node("EditSlidersLoadAdapter", adapter_name=models.adapter),
        "slider_model": _node("EditSlidersApplySTLoRA", model=["model", 0], adapter=["adapter", 0]),
        "prompt": _node(
            "EditSlidersEncodeSubInstructions",
            clip=["clip", 0],
            text=instruction,
            mode="one per line",
            pad_to_512=True,
        ),
        "strengths": _node("EditSlidersSubInstructionStrengths", conditioning=["prompt", 0], strength_1=strength),
        "reference": _node("ReferenceLatent", conditioning=["strengths", 0], latent=["latent", 0]),
        "guided": _node("FluxGuidance", conditioning=["reference", 0], guidance=2.5),
        "sampled": _node(
            "KSamplerAdvanced",
            model=["slider_model", 0],
            positive=["guided", 0],
            negative=["guided", 0],
            latent_image=["latent", 0],
            add_noise="disable" if models.tiny else "enable",
            noise_seed=0,
            steps=TINY_STEPS if models.tiny else STEPS,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            start_at_step=TINY_FIRST_STEP if models.tiny else 0,
            end_at_step=10000,
            return_with_leftover_noise="disable",
        ),
        "decoded": _node("VAEDecode", samples=["sampled", 0], vae=["vae", 0]),
        PICTURE: _node("PreviewImage", images=["decoded", 0]),
    }


def _tiny_loaders(models: Models) -> dict[str, Node]:
    return {
        "model": _node("UNETLoader", unet_name=models.model, weight_dtype="default"),
        "clip": _node("TinyTestTextEncoders", clip_l=models.clip_l, t5xxl=models.t5xxl),
        "vae": _node("VAELoader", vae_name=models.vae),
        "latent": _node("VAEEncode", pixels=["photo", 0], vae=["vae", 0]),
    }


def _loaders(models: Models) -> dict[str, Node]:
    return {
        "model": _node("UNETLoader", unet_name=models.model, weight_dtype="default"),
        "clip": _node("DualCLIPLoader", clip_name1=models.clip_l, clip_name2=models.t5xxl, type="flux"),
        "vae": _node("VAELoader", vae_name=models.vae),
        "scaled": _node("FluxKontextImageScale", image=["photo", 0]),
        "latent": _node("VAEEncode", pixels=["scaled", 0], vae=["vae", 0]),
    }


def _node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}
