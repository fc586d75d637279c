"""Inputs that several nodes share, and the functions that read their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...slider_core import node_names as names
from ...slider_core.conditioning.span_strengths import DEFAULT_CHANNEL
from ...slider_core.int_ranges import parse_int_ranges
from ...slider_core.stable_flow.vital_layers import LAYER_SETS, layer_set, parse_block_indices
from ...slider_core.text.encode import SPLITTERS
from .sockets import StrengthsSocket
from .sweep_distances import DISTANCES, VISION_OR_PIXELS

LISTED = "listed below"  # labels: editSlidersOptions in locales/en/main.json
KONTEXT_MODEL = "FLUX.1 Kontext or a model based on it."

STRENGTH_SCALE = "0 = source, 1 = full edit, above 1 = exaggerated, below 0 = reversed."
STRENGTH_LIST_HINT = "Link a list of strengths to get one image per value in a single run."


def strength_input(
    name: str,
    optional: bool = False,
    default: float = 1.0,
    low: float = -5.0,
    high: float = 5.0,
    tooltip: str = f"{STRENGTH_SCALE} {STRENGTH_LIST_HINT}",
) -> io.MultiType.Input:
    """A strength slider that also accepts a link from a number or from a list of strengths."""
    slider = io.Float.Input(
        name,
        default=default,
        min=low,
        max=high,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        optional=optional,
        tooltip=tooltip,
    )
    return io.MultiType.Input(slider, types=[io.Float, StrengthsSocket])


def fill_strengths(inputs: Sequence[str], strengths: Mapping[str, object]) -> dict[str, object]:
    """A strength for each of a node's strength `inputs`: the given one, or 1."""
    return {name: strengths.get(name, 1.0) for name in inputs}


def channel_input() -> io.String.Input:
    return io.String.Input(
        "channel",
        default=DEFAULT_CHANNEL,
        optional=True,
        advanced=True,
        tooltip="Strengths reach the Apply nodes on the same channel. Change it only if two Apply nodes in one graph "
        "need different strengths.",
    )


def clip_input() -> io.Clip.Input:
    return io.Clip.Input("clip", tooltip="From Load CLIP (Dual) with type flux.")


def instruction_inputs(pad_advanced: bool = False) -> tuple[io.Input, ...]:
    """'clip', 'text', 'mode' and 'pad_to_512' of nodes that encode instructions."""
    return (
        clip_input(),
        io.String.Input(
            "text",
            multiline=True,
            default="make her older\nmake her hair golden",
            tooltip="Weights (word:1.2), escapes \\( \\) and embedding:name work as in CLIP Text Encode (Prompt).",
        ),
        io.Combo.Input(
            "mode",
            options=list(SPLITTERS),  # labels: editSlidersOptions in locales/en/main.json
            tooltip="'one instruction per line': the lines are joined with ' and ', as in training. 'only [[marked]] "
            "phrases': the text is used as it is, and each phrase in [[ ]] gets a slider.",
        ),
        io.Boolean.Input(
            "pad_to_512",
            default=True,
            advanced=pad_advanced,
            tooltip="Pads the T5 text to 512 tokens, as in the training of SliderEdit's adapters. ComfyUI pads to 256, "
            "and FLUX attends to the padding. Keep it on for these adapters; turn it off to get exactly the output of "
            "CLIP Text Encode (Prompt). Prompts in one batch need the same length.",
        ),
    )


def instruction_numbers_input(purpose: str, rest: str) -> io.String.Input:
    """'sub_instructions', for parse_instruction_numbers."""
    return io.String.Input(
        "sub_instructions",
        display_name="instructions",
        default="",
        optional=True,
        tooltip=f"Numbers of the instructions {purpose}, for example 1, 3. {rest}",
    )


def parse_instruction_numbers(text: str) -> list[int]:
    return parse_int_ranges(text, "instruction number", "1, 3-4")


def layer_inputs() -> tuple[io.Combo.Input, io.String.Input]:
    """'layers' and 'list', for parse_layers."""
    return (
        io.Combo.Input(
            "layers",
            options=[*LAYER_SETS, LISTED],
            tooltip="The paper's vital layers, or one of its ablations: all layers keep almost everything, all but "
            "the vital layers almost nothing.",
        ),
        io.String.Input(
            "list",
            display_name="layer_list",
            default="0, 1, 17-18",
            advanced=True,
            tooltip="For 'layer_list below': layer numbers from 0, double blocks first (0 to 18), then single blocks "
            f"(19 to 56). {names.FIND_VITAL_LAYERS} outputs such a list.",
        ),
    )


def parse_layers(model: ModelPatcher, layers: str, listed: str) -> list[int]:
    """Block indices for the values of layer_inputs."""
    return parse_block_indices(listed) if layers == LISTED else layer_set(model, layers)


def fraction_input(
    name: str,
    tooltip: str,
    default: float = 1.0,
    step: float = 0.01,
    display_name: str | None = None,
    slider: bool = False,
    optional: bool = False,
    advanced: bool | None = None,
) -> io.Float.Input:
    """A number from 0 to 1."""
    return io.Float.Input(
        name,
        display_name=display_name,
        default=default,
        min=0.0,
        max=1.0,
        step=step,
        display_mode=io.NumberDisplay.slider if slider else None,
        optional=optional,
        advanced=advanced,
        tooltip=tooltip,
    )


def start_input(
    tooltip: str = "Start of the active range, as a fraction of the sampling schedule: 0 = the first step.",
    step: float = 0.01,
    optional: bool = False,
    advanced: bool | None = None,
) -> io.Float.Input:
    return fraction_input(
        "start", tooltip, 0.0, step, display_name="start_percent", optional=optional, advanced=advanced
    )


def end_input(
    tooltip: str = "End of the active range, as a fraction of the sampling schedule: 1 = after the last step.",
    step: float = 0.01,
    optional: bool = False,
    advanced: bool | None = None,
) -> io.Float.Input:
    return fraction_input("end", tooltip, 1.0, step, display_name="end_percent", optional=optional, advanced=advanced)


def injection_strength_input() -> io.Float.Input:
    return fraction_input(
        "preservation",
        "How much of the source is kept. 0 = each image is generated independently, 1 = the paper's injection; values "
        "between blend an image's own keys and values with the source's.",
        display_name="injection_strength",
        slider=True,
    )


def injection_mask_input() -> io.Mask.Input:
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where the images keep the source: 1 = at the injection strength, 0 = not at all. Without a mask, "
        "everywhere.",
    )


def memory_limit_input() -> io.Float.Input:
    return io.Float.Input(
        "memory_limit",
        display_name="memory_limit_gb",
        default=0.0,
        min=0.0,
        max=4096.0,
        step=0.5,
        advanced=True,
        tooltip="RAM in GB that the cache may use; 0 = half of the free RAM. If the whole cache does not fit, nothing "
        "is cached, and the source is recomputed at every step of every edit.",
    )


def guidance_input(name: str, tooltip: str, default: float = 3.5) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, tooltip=tooltip)


def edit_prompts_input() -> io.String.Input:
    return io.String.Input(
        "edits",
        display_name="edit_prompts",
        multiline=True,
        default="a photo of a cat wearing a hat",
        tooltip="One prompt per edited image, one per line. Each describes its whole image.",
    )


def seed_input(tooltip: str = "Noise seed.", maximum: int = 0xFFFFFFFFFFFFFFFF) -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=maximum,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
    )


def steps_input(tooltip: str, default: int = 15) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=1000, tooltip=tooltip)


def clip_vision_input() -> io.ClipVision.Input:
    return io.ClipVision.Input(
        "clip_vision",
        optional=True,
        tooltip="Compares images by their DINOv2, CLIP or SigLIP features. Without it, images are compared by pixels.",
    )


def distance_inputs() -> tuple[io.Combo.Input, io.Latent.Input]:
    """'distance' and 'latent', for sweep_distances."""
    return (
        io.Combo.Input(
            "distance",
            options=list(DISTANCES),
            default=VISION_OR_PIXELS,
            optional=True,
            tooltip="'clip_vision or pixels': pixels if clip_vision is not linked. 'latent': the sampler's latents. "
            "'LPIPS', 'DreamSim': perceptual distances; they need the Python package of that name and its weights on "
            "this computer.",
        ),
        io.Latent.Input("latent", optional=True, tooltip="The sweep's latents, needed for the distance 'latent'."),
    )
