"""What the methods ask of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class LinearSlice(NamedTuple):
    """Output rows of a linear: `size` units of the model's width from `offset` units on; `size` None = all rows."""

    module: str
    offset: int = 0
    size: int | None = None


class Block(NamedTuple):
    """One of the blocks that a model runs in turn.

    path: the block. passes: a forward for it that changes nothing.
    qkv: its linear whose output begins with Q, K and V of the image's tokens, each as wide as the model.
    joint_sequence: whether that linear's rows begin with the text.
    """

    path: str
    qkv: str
    joint_sequence: bool
    identity_forward: Callable[..., Any]


class Family(ABC):
    """A model architecture.

    name: as users know it.
    text_encoders: ComfyUI's attribute names of the encoders in its CLIP.
    vital_layers: as found for the family's model, for its number of blocks; empty if nobody has looked.
    identity: a small parameter of the diffusion model whose values tell models of the family apart.
    context_encoder: the encoder whose tokens are the rows of the model's text, in order from row 0.
    """

    name: str
    text_encoders: frozenset[str]
    context_encoder: str
    fingerprint_parameter: str
    vital_layers: tuple[int, ...] = ()

    def __deepcopy__(self, memo: object) -> Family:
        """Itself: there is one of each."""
        return self

    @abstractmethod
    def matches(self, diffusion_model: object) -> bool:
        """Whether this is ComfyUI's implementation of the family."""

    @abstractmethod
    def lora_targets(self) -> dict[str, LinearSlice]:
        """Every module name that adapter files use for this family, with dots, to the target in ComfyUI's model."""

    @abstractmethod
    def acts_on_text_only(self, module: str) -> bool:
        """Whether the inputs of this linear are exactly the rows of the text, so that single tokens can be chosen."""

    @abstractmethod
    def tokenizer(self, embedding_directories: Sequence[str]) -> Any:
        """What its CLIP has as `tokenizer`, without any model loaded."""

    @abstractmethod
    def hidden_size(self, diffusion_model: Any) -> int:
        """Hidden size of a loaded model."""

    @abstractmethod
    def pooled_width(self, diffusion_model: Any) -> int:
        """Length of the pooled text vector that a loaded model reads."""

    @abstractmethod
    def text_modulations(self, diffusion_model: Any) -> list[str]:
        """Paths of the modules that give the text stream its modulation, as (attention, mlp) with shift and scale."""

    @abstractmethod
    def text_qkv(self, diffusion_model: Any) -> list[str]:
        """Paths of the linears that make the text's Q, K and V in every block, for its first rows and first columns.

        Q, K and V are each as wide as the model.
        """

    @abstractmethod
    def blocks(self, diffusion_model: Any) -> list[Block]:
        """All blocks in the order in which they run, which is how papers count layers."""

    @abstractmethod
    def image_grid(self, latent: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the tokens of the picture itself, without reference latents, for a latent's shape."""

    def image_tokens(self, latent: Sequence[int]) -> int:
        """Their number."""
        rows, columns = self.image_grid(latent)
        return rows * columns

    @abstractmethod
    def block_index_of(self, options: Mapping[str, Any], diffusion_model: Any) -> int:
        """The layer, counted as in `blocks`, that ComfyUI's extra_options for an attention patch tell of."""

    @abstractmethod
    def adapter_targets(self, kind: str, diffusion_model: Any) -> list[str]:
        """The layers that an adapter of this kind ('STLoRA', 'GSTLoRA') is trained on, by names of `lora_targets`."""

    @abstractmethod
    def inplace_modified_inputs(self, diffusion_model: Any) -> list[str]:
        """Paths of modules whose inputs the model overwrites later, so that gradients need copies of them."""

    @abstractmethod
    def block_output_linears(self, diffusion_model: Any) -> list[str]:
        """Paths of linears in blocks whose outputs are only scaled and added to the block's result.

        No gradient needs their values, unless something that learns scales them, or their result is float16.
        """

    @abstractmethod
    def velocity(
        self,
        diffusion_model: Any,
        latent: torch.Tensor,
        sigma: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        guidance: torch.Tensor,
        references: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """What the bare network says, in its own scaling of latents: noise - data, shaped as `latent`.

        latent: (batch, channels, height, width). sigma, guidance: (batch,). text: (batch, rows, width).
        pooled: (batch, width). references: latents of reference pictures, each (batch, channels, height, width).
        """

    @abstractmethod
    def apply_rope(
        self, queries: torch.Tensor, keys: torch.Tensor, positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys (batch, heads, tokens, width) of an attention patch, text first, as attention sees them."""
