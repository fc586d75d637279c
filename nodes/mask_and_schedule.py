"""Where in the picture and when in the denoising sliders act."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..slider_core.conditioning.mask_and_schedule import apply_mask_and_schedule
from ..slider_core.types import Conditioning
from .common.sockets import CATEGORY, chosen_instructions_input, parse_instruction_numbers


class WhereAndWhen(io.ComfyNode):
    """Confines the strengths of a conditioning to a mask and to a part of the denoising."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersWhereAndWhen",
            display_name="Where and When",
            category=CATEGORY,
            description="Lets the sliders of a conditioning act inside a mask and in a part of the denoising. "
            "Elsewhere they have one other strength, 0 being the source. A mask costs one more model evaluation "
            "per step, a schedule nothing.",
            search_aliases=["mask", "regional", "schedule", "timestep range", "local edit"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="With its strengths set; or any, for a GSTLoRA."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="1 where the sliders act, 0 where not. Without one: everywhere."
                ),
                io.Float.Input(
                    "start", default=0.0, min=0.0, max=1.0, step=0.001, tooltip="When they begin to act: 0 = at first."
                ),
                io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="When they stop: 1 = never."),
                io.Float.Input(
                    "elsewhere",
                    default=0.0,
                    min=-5.0,
                    max=5.0,
                    step=0.01,
                    tooltip="Strength of these sliders outside the mask and before and after: 0 = the source.",
                ),
                chosen_instructions_input(
                    "this is for", "Chain one node for each place. Empty: all sliders, a GSTLoRA and a projector too."
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
