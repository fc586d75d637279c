"""The node that restricts sliders to a mask and to a range of the sampling schedule."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..slider_core import node_names as names
from ..slider_core.conditioning.mask_and_schedule import apply_mask_and_schedule
from ..slider_core.types import Conditioning
from .common import categories
from .common.inputs import end_input, instruction_numbers_input, parse_instruction_numbers, start_input


class MaskAndSchedule(io.ComfyNode):
    """Restricts the strengths of a conditioning to a mask and to a range of the sampling schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersWhereAndWhen",
            display_name=names.MASK_AND_SCHEDULE,
            category=categories.PROMPT,
            description="Restricts the sliders of a conditioning to a mask and to a range of the sampling schedule. "
            "Outside of it they have another strength, by default 0, the source. A mask costs one more model "
            "evaluation per step, a schedule range nothing.",
            search_aliases=["where and when", "slider mask", "regional", "timestep range", "local edit"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip=f"A conditioning with strengths, or for {names.APPLY_GSTLORA} any conditioning.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="1 where the sliders act, 0 where they do not. Without a mask they act everywhere.",
                ),
                start_input(step=0.001),
                end_input(step=0.001),
                io.Float.Input(
                    "elsewhere",
                    display_name="outside_strength",
                    default=0.0,
                    min=-5.0,
                    max=5.0,
                    step=0.01,
                    tooltip="Strength of these sliders outside the mask and outside the schedule range; 0 = the "
                    "source.",
                ),
                instruction_numbers_input(
                    "this node applies to",
                    "Chain several of these nodes for different masks. Empty: all sliders, including those of "
                    f"{names.APPLY_GSTLORA} and {names.PROJECTOR_STRENGTH}.",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls,
        conditioning: Conditioning,
        start: float,
        end: float,
        elsewhere: float,
        mask: torch.Tensor | None = None,
        sub_instructions: str = "",
    ) -> io.NodeOutput:
        chosen = parse_instruction_numbers(sub_instructions)
        return io.NodeOutput(apply_mask_and_schedule(conditioning, mask, start, end, elsewhere, chosen))


NODES: list[type[io.ComfyNode]] = [MaskAndSchedule]
