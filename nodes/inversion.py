"""Nodes that edit real pictures: invert one, keep its trajectory, edit from there."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io, ui

from ..slider_core.stable_flow.inversion import NUDGING, SourceMode, edit_from_trajectory, invert
from ..slider_core.stable_flow.source_kv_cache import check_cached_source
from ..slider_core.stable_flow.trajectory import Trajectory, load_trajectory, save_trajectory
from ..slider_core.text.batched_prompts import batch_prompts, split_prompts
from .common.files import TRAJECTORY, trajectory_fingerprint, trajectory_names, trajectory_path
from .common.progress import previews
from .common.sockets import CATEGORY, TrajectorySocket


class InvertPhotograph(io.ComfyNode):
    """Runs a picture backwards to noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersInvertPhotograph",
            display_name="Invert Photograph",
            category=CATEGORY,
            description="Finds the noise from which the model would make a picture, so that the picture can be edited "
            "by prompts. It runs once per picture; edits start from its result.",
            search_aliases=["stable flow", "inversion", "real image editing", "latent nudging"],
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 dev, without Inject Vital Layers."),
                io.Clip.Input("clip", tooltip="From DualCLIPLoader, type flux."),
                io.Latent.Input("latent", tooltip="The picture, from VAEEncode."),
                io.Sigmas.Input("sigmas", tooltip="From a BasicScheduler: 50 steps, simple, denoise 1."),
                io.String.Input(
                    "prompt", multiline=True, default="a photo of a cat", tooltip="What the picture shows."
                ),
                io.Float.Input(
                    "nudging",
                    default=NUDGING,
                    min=0.1,
                    max=3.0,
                    step=0.01,
                    tooltip="The picture's latent is multiplied by this. The paper: 1.1 to 1.15 reconstructs, 1 does "
                    "not.",
                ),
                io.Int.Input(
                    "refinements",
                    default=0,
                    min=0,
                    max=10,
                    tooltip="0 = as in the paper. Each refinement makes the inversion more exact and costs as many "
                    "steps again.",
                ),
            ],
            outputs=[TrajectorySocket.Output("trajectory", tooltip="For Edit from Trajectory.")],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        latent: dict,
        sigmas: torch.Tensor,
        prompt: str,
        nudging: float,
        refinements: int,
    ) -> io.NodeOutput:
        on_step = previews(model, max(len(sigmas) - 1, 1))
        text = batch_prompts(clip, [prompt.strip()], [1.0])
        found = invert(model, text, latent["samples"], sigmas, prompt.strip(), nudging, refinements, on_step)
        return io.NodeOutput(found, ui=ui.PreviewText(found.describe()))


class EditFromTrajectory(io.ComfyNode):
    """Renders edits of an inverted picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersEditFromTrajectory",
            display_name="Edit from Trajectory",
            category=CATEGORY,
            description="Renders edits of an inverted picture, in the trajectory's own steps. Takes the place of the "
            "sampler.",
            search_aliases=["stable flow", "real image editing"],
            inputs=[
                io.Model.Input("model", tooltip="From Inject Vital Layers, or from Inject Remembered Source."),
                io.Clip.Input("clip", tooltip="The text encoders that the picture was inverted with."),
                TrajectorySocket.Input("trajectory", tooltip="From Invert Photograph or Load Trajectory."),
                io.String.Input(
                    "edits",
                    multiline=True,
                    default="a photo of a cat wearing a hat",
                    tooltip="One edited picture per line, each described in full.",
                ),
                io.Float.Input(
                    "edit_guidance", default=3.0, min=0.0, max=100.0, step=0.1, tooltip="FLUX guidance of the edits."
                ),
                io.Combo.Input(
                    "source",
                    options=[mode.value for mode in SourceMode],
                    tooltip="The first picture of the batch, from which the edits take what they keep. 'follows the "
                    "trajectory': it is put back to the inverted picture after every step. 'as in the published "
                    "code': to that of another step, to reproduce its results. 'remembered by the model': no source "
                    "in the batch, for a model from Inject Remembered Source.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The source, unless it is remembered, then an edit per line.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, trajectory: Trajectory, edits: str, edit_guidance: float, source: str
    ) -> io.NodeOutput:
        mode = SourceMode(source)
        if mode is SourceMode.CACHED:
            check_cached_source(model, trajectory)
        prompts = split_prompts(edits)
        guidances = [edit_guidance] * len(prompts)
        if mode is not SourceMode.CACHED:
            prompts, guidances = [trajectory.prompt, *prompts], [1.0, *guidances]
        text = batch_prompts(clip, prompts, guidances)
        on_step = previews(model, trajectory.steps)
        samples = edit_from_trajectory(model, text, trajectory, mode, on_step)
        return io.NodeOutput({"samples": samples})


class SaveTrajectory(io.ComfyNode):
    """Writes a trajectory to ComfyUI's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersSaveTrajectory",
            display_name="Save Trajectory",
            category=CATEGORY,
            description="Keeps an inverted picture on disk, so that it need not be inverted again.",
            inputs=[
                TrajectorySocket.Input("trajectory", tooltip="From Invert Photograph."),
                io.String.Input("filename_prefix", default="trajectories/picture", tooltip="In the output folder."),
            ],
            is_output_node=True,
            has_intermediate_output=True,  # the page shows a text output for nodes with this flag
        )

    @classmethod
    def execute(cls, trajectory: Trajectory, filename_prefix: str) -> io.NodeOutput:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_{TRAJECTORY}"
        save_trajectory(trajectory, Path(folder) / file)
        return io.NodeOutput(ui=ui.PreviewText(f"{Path(subfolder) / file}\n{trajectory.describe()}"))


class LoadTrajectory(io.ComfyNode):
    """Reads what Save Trajectory wrote."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersLoadTrajectory",
            display_name="Load Trajectory",
            category=CATEGORY,
            description="Reads an inverted picture from ComfyUI's output or input folder.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=trajectory_names(),
                    tooltip="Files that end in .trajectory.safetensors. Press R in the page to see new ones.",
                )
            ],
            outputs=[TrajectorySocket.Output("trajectory", tooltip="For Edit from Trajectory.")],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple[float, int]:
        return trajectory_fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        found = load_trajectory(trajectory_path(file))
        return io.NodeOutput(found, ui=ui.PreviewText(found.describe()))
