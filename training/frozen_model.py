"""The frozen diffusion model that adapters are trained on, loaded by ComfyUI, with exact gradients through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from slider_core.families import Family, family_of
from slider_core.families.network import diffusion_model_of
from slider_core.patching.forward_patches import ForwardWrapper, patched_forwards

from .block_checkpointing import checkpoint_block, copy_input, copy_inputs, skip_recomputation

_ACTIVATION_BYTES = 34
"""Activations that one block keeps for its backward pass: bytes per token and unit of the hidden size."""


class Text(NamedTuple):
    """An encoded prompt. states: (batch, tokens, width); pooled: (batch, width)."""

    states: torch.Tensor
    pooled: torch.Tensor


class FrozenModel:
    """A diffusion model without trainable parameters.

    gradient_checkpointing: store only the inputs and attention results of each block and recompute the rest in the
    backward pass; see block_checkpointing.
    """

    def __init__(self, patcher: ModelPatcher, gradient_checkpointing: bool = True):
        self.patcher = patcher
        self.gradient_checkpointing = gradient_checkpointing
        self.family: Family = family_of(patcher)
        self.network.requires_grad_(False)

    @classmethod
    def load(cls, file: Path, weight_dtype: str, gradient_checkpointing: bool) -> FrozenModel:
        """Load a model file. weight_dtype: 'default' or the name of a torch dtype to store the weights in."""
        options = {} if weight_dtype == "default" else {"dtype": getattr(torch, weight_dtype)}
        return cls(comfy.sd.load_diffusion_model(str(file), model_options=options), gradient_checkpointing)

    @property
    def network(self) -> torch.nn.Module:
        return diffusion_model_of(self.patcher.model)

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation."""
        return self.patcher.model.get_dtype_inference()

    def load_to_device(self, batch_size: int, num_tokens: int) -> None:
        """Load the weights to the device, leaving room for batches of samples with `num_tokens` text and image tokens.

        Weights that do not fit stay on the CPU, as in ComfyUI's low-VRAM mode.
        """
        hidden_size = self.family.hidden_size(self.network)
        checkpointed = 2 * len(self.family.blocks(self.network)) * num_tokens * hidden_size * self.dtype.itemsize
        needed = batch_size * (checkpointed + num_tokens * hidden_size * _ACTIVATION_BYTES)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)

    def scale_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """A VAE latent in the scaling that the model is trained on."""
        return self.patcher.model.process_latent_in(latent)

    @contextlib.contextmanager
    def patched(self, wrappers: Mapping[str, ForwardWrapper]) -> Iterator[None]:
        """Apply forward wrappers, by module path, within the context and make gradients exact.

        The backward pass must run within the context too: recomputed blocks need the same wrappers.
        """
        copies = dict.fromkeys(self.family.inplace_modified_inputs(self.network), copy_input)
        wrap_block = checkpoint_block if self.gradient_checkpointing else copy_inputs
        blocks = dict.fromkeys((block.path for block in self.family.blocks(self.network)), wrap_block)
        reads_outputs = self.dtype == torch.float16  # ComfyUI then applies nan_to_num to the output of blocks
        skip = self.gradient_checkpointing and not reads_outputs
        outputs = dict.fromkeys(self.family.block_output_linears(self.network) if skip else [], skip_recomputation)
        with patched_forwards(self.network, [outputs, wrappers, copies, blocks]):
            yield

    def velocity(
        self,
        latent: torch.Tensor,
        sigma: torch.Tensor,
        text: Text,
        guidance: float,
        reference_latents: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """The predicted velocity, noise - data, in float32: (batch, channels, height, width), as `latent`.

        sigma: (batch,). guidance: FLUX's guidance embedding.
        """
        to: Any = {"device": self.device, "dtype": self.dtype}
        return self.family.velocity(
            self.network,
            latent.to(**to),
            sigma.to(self.device, torch.float32),
            text.states.to(**to),
            text.pooled.to(**to),
            torch.full((len(latent),), guidance, **to),
            [reference.to(**to) for reference in reference_latents],
        ).float()

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())
