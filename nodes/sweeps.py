"""Nodes that render several strengths in one run."""

from __future__ import annotations

from comfy_api.latest import io

from ..slider_core.strength import Strength
from ..slider_core.sweep import latent_for_sweep, parse_list, spaced
from .types import CATEGORY, Strengths


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
            outputs=[Strengths.Output("strengths")],
        )

    @classmethod
    def execute(cls, first: float, last: float, count: int) -> io.NodeOutput:
        return io.NodeOutput(spaced(first, last, count))


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
            outputs=[Strengths.Output("strengths")],
        )

    @classmethod
    def execute(cls, values: str) -> io.NodeOutput:
        return io.NodeOutput(parse_list(values))


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
                Strengths.Input("strengths", tooltip="From Strength Range or Strength List."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, latent: dict, strengths: Strength) -> io.NodeOutput:
        return io.NodeOutput(latent_for_sweep(latent, len(strengths)))
