"""Nodes for tests, the demo and benchmarks only.

They load tiny text encoders, save latents without rounding and load golden inputs. The pack also delays the end of
interrupted jobs, as a busy machine would.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
from comfy_api.latest import ComfyExtension, io
from execution import PromptQueue
from server import PromptServer

from .golden import GOLDEN_NODES

CLIP_L_CONFIG = {"num_hidden_layers": 2, "intermediate_size": 256}
T5_CONFIG = {"d_model": 64, "d_ff": 128, "num_heads": 1, "num_layers": 2}


class TinyTestTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("text_encoders")
        return io.Schema(
            node_id="TinyTestTextEncoders",
            display_name="Load tiny text encoders",
            category="tests",
            inputs=[io.Combo.Input("clip_l", options=files), io.Combo.Input("t5xxl", options=files)],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_l: str, t5xxl: str) -> io.NodeOutput:
        paths = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in (clip_l, t5xxl)]
        clip = comfy.sd.load_text_encoder_state_dicts(
            [comfy.utils.load_torch_file(path, safe_load=True) for path in paths],
            clip_type=comfy.sd.CLIPType.FLUX,
            model_options={"model_config": CLIP_L_CONFIG, "t5xxl_model_config": T5_CONFIG},
        )
        return io.NodeOutput(clip)


class TinyTestSaveLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyTestSaveLatent",
            display_name="Save latent as float32",
            category="tests",
            inputs=[io.Latent.Input("samples")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: io.Latent.Type) -> io.NodeOutput:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            "tiny_latent", folder_paths.get_output_directory()
        )
        filename = f"{name}_{counter:05}_.npy"
        np.save(Path(folder) / filename, samples["samples"].float().cpu().numpy())
        return io.NodeOutput(ui={"latent": [{"filename": filename, "subfolder": subfolder, "type": "output"}]})


class TinyTestNodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyTestTextEncoders, TinyTestSaveLatent, *GOLDEN_NODES]


class SlowTaskDone(PromptQueue):
    """Prolongs the time between the interruption message to the page and the job's entry in the history."""

    def task_done(self, item_id: int, history_result: dict, status: Any, process_item: Any = None) -> None:
        if not status.completed:
            time.sleep(0.5)
        super().task_done(item_id, history_result, status, process_item)


async def comfy_entrypoint() -> TinyTestNodes:
    PromptServer.instance.prompt_queue.__class__ = SlowTaskDone
    return TinyTestNodes()
