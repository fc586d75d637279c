"""A node that loads text encoders of FLUX.1's architectures (CLIP-L and T5) of any size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io


class LoadSmallTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("text_encoders")
        return io.Schema(
            node_id="SmallTextEncoders",
            display_name="Load Small Text Encoders",
            category="loaders",
            description="DualCLIPLoader for text encoders that are smaller than FLUX.1's own.",
            inputs=[
                io.Combo.Input("clip_l", options=files),
                io.Combo.Input("t5xxl", options=files),
                io.Int.Input(
                    "rows",
                    default=32,
                    min=1,
                    max=512,
                    tooltip="Minimum number of T5 tokens; shorter prompts are padded.",
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_l: str, t5xxl: str, rows: int) -> io.NodeOutput:
        paths = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in (clip_l, t5xxl)]
        weights = [comfy.utils.load_torch_file(path, safe_load=True) for path in paths]
        clip = comfy.sd.load_text_encoder_state_dicts(
            weights,
            clip_type=comfy.sd.CLIPType.FLUX,
            model_options={"model_config": _clip_l_config(weights[0]), "t5xxl_model_config": _t5_config(weights[1])},
        )
        clip.set_tokenizer_option("t5xxl_min_length", rows)
        return io.NodeOutput(clip)


def _clip_l_config(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    hidden = weights["text_model.embeddings.token_embedding.weight"].shape[1]
    return {
        "hidden_size": hidden,
        "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": max(hidden // 64, 1),
        "num_hidden_layers": _layers(weights, r"text_model\.encoder\.layers\.(\d+)\."),
    }


def _t5_config(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    attention = "encoder.block.0.layer.0.SelfAttention"
    heads = weights[f"{attention}.relative_attention_bias.weight"].shape[1]
    return {
        "d_model": weights["shared.weight"].shape[1],
        "d_ff": weights["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "d_kv": weights[f"{attention}.q.weight"].shape[0] // heads,
        "num_heads": heads,
        "num_layers": _layers(weights, r"encoder\.block\.(\d+)\."),
    }


def _layers(names: Iterable[str], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in names if (match := re.match(pattern, name)))


class SmallTextEncoders(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadSmallTextEncoders]


async def comfy_entrypoint() -> SmallTextEncoders:
    return SmallTextEncoders()
