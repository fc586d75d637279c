"""Nodes that edit real images: invert an image, save its trajectory, edit from there."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io, ui

from ..slider_core import node_names as names
from ..slider_core.stable_flow.inversion import NUDGING, SourceMode, edit_from_trajectory, invert
from ..slider_core.stable_flow.source_kv_cache import check_cached_source
from ..slider_core.stable_flow.trajectory import Trajectory, load_trajectory, save_trajectory
from ..slider_core.text.batched_prompts import batch_prompts, split_prompts
from .common import categories
from .common.files import TRAJECTORY, FileStamp, trajectory_names, trajectory_path, trajectory_stamp
from .common.inputs import clip_input, edit_prompts_input, guidance_input
from .common.progress import previews
from .common.sockets import TrajectorySocket


class InvertImage(io.ComfyNode):
    """Inverts an image to the noise that generates it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersInvertPhotograph",
            display_name=names.INVERT_IMAGE,
            category=categories.STABLE_FLOW,
            description="Finds the noise from which the model would generate a given image, so that the image can be "
            "edited with prompts. Invert an image once; all edits start from the result.",
            search_aliases=["invert photograph", "inversion", "real image editing", "latent nudging"],
            inputs=[
                io.Model.Input("model", tooltip=f"FLUX.1 dev, without {names.KEEP_SOURCE}."),
                clip_input(),
                io.Latent.Input("latent", tooltip="The image, from VAE Encode."),
                io.Sigmas.Input("sigmas", tooltip="From BasicScheduler: 50 steps, simple, denoise 1."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of a cat",
                    tooltip="A prompt that describes the image.",
                ),
                io.Float.Input(
                    "nudging",
                    default=NUDGING,
                    min=0.1,
                    max=3.0,
                    step=0.01,
                    tooltip="Factor on the image's latent. According to the paper, 1.1 to 1.15 reconstructs the image "
                    "and 1 does not.",
                ),
                io.Int.Input(
                    "refinements",
                    default=0,
                    min=0,
                    max=10,
                    tooltip="0 = as in the paper. Each refinement makes the inversion more accurate, at the cost of "
                    "the same number of additional model evaluations.",
                ),
            ],
            outputs=[TrajectorySocket.Output("trajectory", tooltip=f"For {names.EDIT_INVERTED_IMAGE}.")],
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
        trajectory = invert(model, text, latent["samples"], sigmas, prompt.strip(), nudging, refinements, on_step)
        return io.NodeOutput(trajectory, ui=ui.PreviewText(trajectory.describe()))


class EditInvertedImage(io.ComfyNode):
    """Samples edits of an inverted image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersEditFromTrajectory",
            display_name=names.EDIT_INVERTED_IMAGE,
            category=categories.STABLE_FLOW,
            description="Samples edits of an inverted image, with the trajectory's own steps. Replaces the sampler.",
            search_aliases=["edit from trajectory", "real image editing"],
            inputs=[
                io.Model.Input("model", tooltip=f"From {names.KEEP_SOURCE} or {names.KEEP_CACHED_SOURCE}."),
                io.Clip.Input("clip", tooltip="The text encoders that the image was inverted with."),
                TrajectorySocket.Input("trajectory", tooltip=f"From {names.INVERT_IMAGE} or {names.LOAD_TRAJECTORY}."),
                edit_prompts_input(),
                guidance_input("edit_guidance", "FLUX guidance of the edits.", default=3.0),
                io.Combo.Input(
                    "source",
                    options=[mode.value for mode in SourceMode],  # labels: editSlidersOptions in locales/en/main.json
                    tooltip="The first image of the batch, from which the edits keep what does not change. 'follows "
                    "the trajectory': it is reset to the inverted image's latent after every step. 'as in the "
                    "published code': it is reset to the latent of another step, which reproduces the published "
                    "results. 'cached by the model': the batch has no source; for a model from "
                    f"{names.KEEP_CACHED_SOURCE}.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The source (unless it is cached), followed by one edit per prompt.")],
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
            display_name=names.SAVE_TRAJECTORY,
            category=categories.STABLE_FLOW,
            description="Saves an inverted image to disk, so that it does not have to be inverted again.",
            search_aliases=["stable flow", "save inversion"],
            inputs=[
                TrajectorySocket.Input("trajectory", tooltip=f"From {names.INVERT_IMAGE}."),
                io.String.Input(
                    "filename_prefix", default="trajectories/picture", tooltip="File name in the output folder."
                ),
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
    """Reads a trajectory that Save Trajectory wrote."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditSlidersLoadTrajectory",
            display_name=names.LOAD_TRAJECTORY,
            category=categories.STABLE_FLOW,
            description="Loads an inverted image from ComfyUI's output or input folder.",
            search_aliases=["stable flow", "load inversion"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=trajectory_names(),
                    tooltip=f"Files that end in {TRAJECTORY}. Press R to list new files.",
                )
            ],
            outputs=[TrajectorySocket.Output("trajectory", tooltip=f"For {names.EDIT_INVERTED_IMAGE}.")],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> FileStamp:
        return trajectory_stamp(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        trajectory = load_trajectory(trajectory_path(file))
        return io.NodeOutput(trajectory, ui=ui.PreviewText(trajectory.describe()))


NODES: list[type[io.ComfyNode]] = [InvertImage, EditInvertedImage, SaveTrajectory, LoadTrajectory]
