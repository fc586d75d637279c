"""Nodes that render several strengths in one run."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..slider_core.patching.batch_splitting import split_batches
from ..slider_core.strength import Strengths
from ..slider_core.sweep import linspace, parse_strengths, repeat_latent, strength_grid
from .common.sockets import CATEGORY, StrengthsSocket


class StrengthRange(io.ComfyNode):
    """Evenly spaced strengths, one per image of the batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersStrengthRange",
            display_name="Strength Range",
            category=CATEGORY,
            description="A list of evenly spaced strengths. Link it to a slider and to Latent for Sweep: one run then "
            "renders one picture per strength.",
            search_aliases=["sweep", "strength list", "xy plot"],
            inputs=[
                io.Float.Input(
                    "first", default=0.0, min=-5.0, max=5.0, step=0.01, tooltip="Strength of the first image."
                ),
                io.Float.Input(
                    "last", default=1.5, min=-5.0, max=5.0, step=0.01, tooltip="Strength of the last image."
                ),
                io.Int.Input("count", default=7, min=1, max=256, tooltip="Number of images."),
            ],
            outputs=[StrengthsSocket.Output("strengths")],
        )

    @classmethod
    def execute(cls, first: float, last: float, count: int) -> io.NodeOutput:
        return io.NodeOutput(linspace(first, last, count))


class StrengthList(io.ComfyNode):
    """Strengths typed by hand, one per image of the batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersStrengthList",
            display_name="Strength List",
            category=CATEGORY,
            description="A list of strengths typed by hand. Link it to a slider and to Latent for Sweep.",
            search_aliases=["sweep", "strengths"],
            inputs=[
                io.String.Input("values", default="0, 0.5, 1, 1.5", tooltip="Numbers separated by commas or spaces.")
            ],
            outputs=[StrengthsSocket.Output("strengths")],
        )

    @classmethod
    def execute(cls, values: str) -> io.NodeOutput:
        return io.NodeOutput(parse_strengths(values))


class StrengthGrid(io.ComfyNode):
    """Every combination of two lists of strengths, one per image of the batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersStrengthGrid",
            display_name="Strength Grid",
            category=CATEGORY,
            description="Combines two lists of strengths, row by row, so that one run renders a grid: link one output "
            "to one slider, the other to another, and either to Latent for Sweep.",
            search_aliases=["sweep", "xy plot", "2d sweep"],
            inputs=[
                StrengthsSocket.Input("down", tooltip="Strengths of the rows, from Strength Range or Strength List."),
                StrengthsSocket.Input("across", tooltip="Strengths of the columns."),
            ],
            outputs=[
                StrengthsSocket.Output("down", tooltip="For the slider that changes from row to row."),
                StrengthsSocket.Output("across", tooltip="For the slider that changes from column to column."),
                io.Int.Output("columns", tooltip="How many pictures make a row."),
            ],
        )

    @classmethod
    def execute(cls, down: Strengths, across: Strengths) -> io.NodeOutput:
        return io.NodeOutput(*strength_grid(down, across), len(across))


class ImagesAtOnce(io.ComfyNode):
    """Computes a batch a few images at a time, so that a sweep of any length fits in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersImagesAtOnce",
            display_name="Images at Once",
            category=CATEGORY,
            description="Lets the model compute a batch a few images at a time, with any sampler and the same result. "
            "For sweeps that are too long for the memory.",
            search_aliases=["split batch", "sweep", "low vram", "out of memory"],
            inputs=[
                io.Model.Input("model", tooltip="With its sliders on it, or before they are."),
                io.Int.Input(
                    "at_once",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Images that the model computes together. 0: as many as fit in the free memory.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, at_once: int) -> io.NodeOutput:
        return io.NodeOutput(split_batches(model, at_once))


class LatentForSweep(io.ComfyNode):
    """Makes a latent batch as long as a list of strengths, with the same noise for every image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersLatentForSweep",
            display_name="Latent for Sweep",
            category=CATEGORY,
            description="Repeats a latent once per strength and lets all of them start from the same noise. With "
            "a sampler that adds no noise on the way, such as euler, nothing else differs between the pictures.",
            search_aliases=["repeat latent same noise", "sweep"],
            inputs=[
                io.Latent.Input("latent", tooltip="One latent image."),
                StrengthsSocket.Input("strengths", tooltip="From Strength Range or Strength List."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent: dict, strengths: Strengths) -> io.NodeOutput:
        return io.NodeOutput(repeat_latent(latent, len(strengths)))
