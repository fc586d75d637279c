"""Nodes that render several strengths in one run."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.patching.batch_splitting import split_batches
from ..slider_core.strength import Strengths
from ..slider_core.sweep import linspace, parse_strengths, repeat_latent, strength_grid
from .common import categories
from .common.sockets import StrengthsSocket


class StrengthRange(io.ComfyNode):
    """Evenly spaced strengths, one per image of the batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersStrengthRange",
            display_name=names.STRENGTH_RANGE,
            category=categories.SWEEP,
            description="A list of evenly spaced strengths. Link it to a slider and to "
            f"{names.REPEAT_LATENT_FOR_SWEEP}: one run then renders one image per strength.",
            search_aliases=["sweep", "strength list", "xy plot"],
            inputs=[
                io.Float.Input(
                    "first", default=0.0, min=-5.0, max=5.0, step=0.01, tooltip="Strength of the first image."
                ),
                io.Float.Input(
                    "last", default=1.5, min=-5.0, max=5.0, step=0.01, tooltip="Strength of the last image."
                ),
                io.Int.Input("count", default=7, min=1, max=256, tooltip="Number of strengths, one per image."),
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
            display_name=names.STRENGTH_LIST,
            category=categories.SWEEP,
            description="A list of strengths typed by hand. Link it to a slider and to "
            f"{names.REPEAT_LATENT_FOR_SWEEP}: one run then renders one image per strength.",
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
            display_name=names.STRENGTH_GRID,
            category=categories.SWEEP,
            description="Combines two lists of strengths row by row, so that one run renders a grid. Link "
            "row_strengths to one slider, column_strengths to another, and either of them to "
            f"{names.REPEAT_LATENT_FOR_SWEEP}.",
            search_aliases=["sweep", "xy plot", "2d sweep"],
            inputs=[
                StrengthsSocket.Input(
                    "down",
                    display_name="row_strengths",
                    tooltip=f"One strength per row, from {names.STRENGTH_RANGE} or {names.STRENGTH_LIST}.",
                ),
                StrengthsSocket.Input(
                    "across",
                    display_name="column_strengths",
                    tooltip=f"One strength per column, from {names.STRENGTH_RANGE} or {names.STRENGTH_LIST}.",
                ),
            ],
            outputs=[
                StrengthsSocket.Output(
                    "down",
                    display_name="row_strengths",
                    tooltip="One strength per image, for the slider that changes from row to row.",
                ),
                StrengthsSocket.Output(
                    "across",
                    display_name="column_strengths",
                    tooltip="One strength per image, for the slider that changes from column to column.",
                ),
                io.Int.Output("columns", tooltip=f"Number of images per row, for {names.SAVE_SWEEP_GRID}."),
            ],
        )

    @classmethod
    def execute(cls, down: Strengths, across: Strengths) -> io.NodeOutput:
        return io.NodeOutput(*strength_grid(down, across), len(across))


class RepeatLatentForSweep(io.ComfyNode):
    """Makes a latent batch with one image per strength, all with the same noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersLatentForSweep",
            display_name=names.REPEAT_LATENT_FOR_SWEEP,
            category=categories.SWEEP,
            description="Repeats a latent once per strength, and all copies start from the same noise. With a sampler "
            "that adds no noise during sampling, such as euler, the images differ in nothing but the strength.",
            search_aliases=["latent for sweep", "repeat latent same noise", "sweep"],
            inputs=[
                io.Latent.Input("latent", tooltip="One latent image."),
                StrengthsSocket.Input(
                    "strengths", tooltip=f"From {names.STRENGTH_RANGE}, {names.STRENGTH_LIST} or {names.STRENGTH_GRID}."
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent: dict, strengths: Strengths) -> io.NodeOutput:
        return io.NodeOutput(repeat_latent(latent, len(strengths)))


class SplitBatch(io.ComfyNode):
    """Evaluates the model on a few images of a batch at a time, so that a sweep of any length fits in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersImagesAtOnce",
            display_name=names.SPLIT_BATCH,
            category=categories.SWEEP,
            description="Evaluates the model on a few images of a batch at a time, with any sampler and the same "
            "result. For sweeps that do not fit in memory as one batch.",
            search_aliases=["images at once", "sweep", "low memory", "out of memory"],
            inputs=[
                io.Model.Input("model", tooltip="Before or after the nodes that apply sliders."),
                io.Int.Input(
                    "at_once",
                    display_name="max_batch_size",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Maximum number of images per model evaluation; 0 = as many as fit in the free memory.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, at_once: int) -> io.NodeOutput:
        return io.NodeOutput(split_batches(model, at_once))


NODES: list[type[io.ComfyNode]] = [StrengthRange, StrengthList, StrengthGrid, RepeatLatentForSweep, SplitBatch]
