"""The graphs that render the demo's images, in ComfyUI's API format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models import Models

IMAGE, CALIBRATED = "image", "calibrated image"
LORA_IN_PROJECTOR_FILE = "none, or in the projector's file"
MINIATURE_STEPS = 12
MINIATURE_VITAL_LAYERS = "0, 2, 4"  # result of: python -m training.miniature layers
STEPS = 20

Node = dict[str, Any]
Graph = dict[str, Node]
Strengths = float | tuple[float, ...]


def edit_graph(models: Models, photo: str, instructions: Sequence[str], strengths: Sequence[Strengths]) -> Graph:
    """Edit an input image with instructions, each at its strength; the node IMAGE outputs the result.

    Lists of strengths, all of one length, give one image per item, from the same noise.
    """
    lists = [f"list_{k}" for k, strength in enumerate(strengths, 1) if not isinstance(strength, float)]
    graph = {
        **_loaders(models, photo),
        "adapter": _node("EditSlidersLoadAdapter", adapter_name=models.adapter),
        "slider_model": _node("EditSlidersApplySTLoRA", model=["model", 0], adapter=["adapter", 0]),
        "prompt": _prompt(models, instructions),
        "strengths": _node("EditSlidersSubInstructionStrengths", conditioning=["prompt", 0]),
        **_sampling(models, "slider_model", "strengths"),
    }
    for k, strength in enumerate(strengths, 1):
        graph["strengths"]["inputs"][f"strength_{k}"] = _strength(graph, f"list_{k}", strength)
    return _with_sweep(graph, lists[0]) if lists else graph


def projector_graph(models: Models, photo: str, instruction: str, strengths: Strengths) -> Graph:
    """Edit an input image with a strength projector; otherwise as edit_graph."""
    projector = _node("EditSlidersLoadProjector", projector_name=models.projector, lora_name=LORA_IN_PROJECTOR_FILE)
    graph = {
        **_loaders(models, photo),
        "projector": projector,
        "slider_model": _node("EditSlidersApplyProjector", model=["model", 0], projector=["projector", 0]),
        "prompt": _prompt(models, [instruction]),
        "strengths": _node(
            "EditSlidersProjectorStrength",
            conditioning=["prompt", 0],
            projector=["projector", 0],
            mode="clamp to 0..1",
        ),
        **_sampling(models, "slider_model", "strengths"),
    }
    graph["strengths"]["inputs"]["strength"] = _strength(graph, "list_1", strengths)
    return _with_sweep(graph, "list_1")


def calibrated_graph(models: Models, photo: str, instruction: str, strengths: Sequence[float]) -> Graph:
    """edit_graph for a list of strengths, and the same sweep calibrated by its images, whose node is CALIBRATED."""
    graph = edit_graph(models, photo, [instruction], [tuple(strengths)])
    return {
        **graph,
        "curve": _node("EditSlidersCalibrate", images=["decoded", 0], strengths=["list_1", 0]),
        "position": _node("EditSlidersCalibratedStrength", position=["list_1", 0], curve=["curve", 0], on=True),
        "even": _node("EditSlidersSubInstructionStrengths", conditioning=["prompt", 0], strength_1=["position", 0]),
        "even_reference": _with_inputs(graph["reference"], conditioning=["even", 0]),
        "even_guided": _with_inputs(graph["guided"], conditioning=["even_reference", 0]),
        "even_sampled": _with_inputs(graph["sampled"], positive=["even_guided", 0]),
        "even_decoded": _with_inputs(graph["decoded"], samples=["even_sampled", 0]),
        CALIBRATED: _with_inputs(graph[IMAGE], images=["even_decoded", 0]),
    }


def parallel_graph(models: Models, photo: str, edits: Sequence[str]) -> Graph:
    """The source and its edits in one batch, without an adapter (Stable Flow); the node IMAGE outputs all of them."""
    graph = {
        **_loaders(models, photo),
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
        **_sampling(models, "injected", "prompts"),
        "same_noise": _node("EditSlidersSameNoise", latent=["source", 0], images=["prompts", 1]),
    }
    graph["sampled"]["inputs"]["latent_image"] = ["same_noise", 0]
    return graph


def _prompt(models: Models, instructions: Sequence[str]) -> Node:
    return _node(
        "EditSlidersEncodeSubInstructions",
        clip=["clip", 0],
        text="\n".join(instructions),
        mode="one per line",
        pad_to_512=not models.miniature,
    )


def _strength(graph: Graph, name: str, strength: Strengths) -> float | list[str | int]:
    """The value of a strength input: the number, or a link to a Sweep Strengths (List) node called `name`."""
    if isinstance(strength, float):
        return strength
    graph[name] = _node("EditSlidersStrengthList", values=", ".join(map(str, strength)))
    return [name, 0]


def _with_sweep(graph: Graph, strengths: str) -> Graph:
    """The graph with one latent per strength of a list."""
    latent = _node("EditSlidersLatentForSweep", latent=["source", 0], strengths=[strengths, 0])
    return {**graph, "latents": latent, "sampled": _with_inputs(graph["sampled"], latent_image=["latents", 0])}


def _loaders(models: Models, photo: str) -> Graph:
    loaders = {
        "photo": _node("LoadImage", image=photo),
        "model": _node("UNETLoader", unet_name=models.model, weight_dtype="default"),
        "vae": _node("VAELoader", vae_name=models.vae),
    }
    encoders = {"clip_l": models.clip_l, "t5xxl": models.t5xxl}
    if models.miniature:
        return {
            **loaders,
            "clip": _node("SmallTextEncoders", rows=32, **encoders),
            "source": _node("VAEEncode", pixels=["photo", 0], vae=["vae", 0]),
        }
    return {
        **loaders,
        "clip": _node("DualCLIPLoader", clip_name1=models.clip_l, clip_name2=models.t5xxl, type="flux"),
        "scaled": _node("FluxKontextImageScale", image=["photo", 0]),
        "source": _node("VAEEncode", pixels=["scaled", 0], vae=["vae", 0]),
    }


def _sampling(models: Models, model: str, conditioning: str) -> Graph:
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
        IMAGE: _node("PreviewImage", images=["decoded", 0]),
    }


def _with_inputs(node: Node, **changed: Any) -> Node:
    return {**node, "inputs": {**node["inputs"], **changed}}


def _node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}
