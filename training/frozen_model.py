"""The frozen model that adapters are trained on, as ComfyUI loads it, with exact gradients through it.

ComfyUI's blocks overwrite their inputs. Plain autograd refuses that, and checkpointing hides it and gives wrong
gradients; here everything that is overwritten is copied first.
"""

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
"""Per token and unit of width, of what one block keeps for its backward pass."""


class Text(NamedTuple):
    """An encoded prompt. states: (batch, rows, width); pooled: (batch, width)."""

    states: torch.Tensor
    pooled: torch.Tensor


class BaseModel:
    """A frozen diffusion model.

    checkpointing: of each block keep only what enters it and what its attention says; compute the rest once more in
    the backward pass, except what ends the block.
    """

    def __init__(self, patcher: ModelPatcher, checkpointing: bool = True):
        self.patcher = patcher
        self.checkpointing = checkpointing
        self.family: Family = family_of(patcher)
        self.network.requires_grad_(False)

    @classmethod
    def load(cls, file: Path, weight_dtype: str, checkpointing: bool) -> BaseModel:
        """Read a checkpoint by ComfyUI's loader; weight_dtype: 'default' or a torch dtype to store the weights in."""
        options = {} if weight_dtype == "default" else {"dtype": getattr(torch, weight_dtype)}
        return cls(comfy.sd.load_diffusion_model(str(file), model_options=options), checkpointing)

    @property
    def network(self) -> torch.nn.Module:
        return diffusion_model_of(self.patcher.model)

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.patcher.model.get_dtype_inference()

    def to_device(self, images: int, tokens: int) -> None:
        """Load it for batches of `images` with `tokens` each; what does not fit beside them stays on the CPU."""
        width = self.family.hidden_size(self.network)
        kept = 2 * len(self.family.blocks(self.network)) * tokens * width * self.dtype.itemsize
        needed = images * (kept + tokens * width * _ACTIVATION_BYTES)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)

    def latent(self, encoded: torch.Tensor) -> torch.Tensor:
        """What a VAE gives, in the model's own scaling."""
        return self.patcher.model.process_latent_in(encoded)

    @contextlib.contextmanager
    def changed(self, changes: Mapping[str, ForwardWrapper]) -> Iterator[None]:
        """With these overrides and gradients, until the context ends; the backward pass belongs inside it.

        Checkpointed blocks run once more in the backward pass, and must find the same overrides there.
        """
        copies = dict.fromkeys(self.family.inplace_modified_inputs(self.network), copy_input)
        wrap = checkpoint_block if self.checkpointing else copy_inputs
        blocks = dict.fromkeys((block.path for block in self.family.blocks(self.network)), wrap)
        uses_results = self.dtype == torch.float16  # ComfyUI passes those of blocks through nan_to_num
        last = self.family.block_output_linears(self.network) if self.checkpointing and not uses_results else []
        ends = dict.fromkeys(last, skip_recomputation)
        with patched_forwards(self.network, [ends, changes, copies, blocks]):
            yield

    def velocity(
        self,
        latent: torch.Tensor,
        sigma: torch.Tensor,
        text: Text,
        guidance: float,
        references: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Its noise - data, float32, shaped as `latent` (batch, channels, height, width); sigma: (batch,)."""
        place: Any = {"device": self.device, "dtype": self.dtype}
        return self.family.velocity(
            self.network,
            latent.to(**place),
            sigma.to(self.device, torch.float32),
            text.states.to(**place),
            text.pooled.to(**place),
            torch.full((len(latent),), guidance, **place),
            [reference.to(**place) for reference in references],
        ).float()

    @cached_property
    def parameters(self) -> int:
        """Their number."""
        return sum(parameter.numel() for parameter in self.network.parameters())
