"""The interface of a model family: everything that the methods need to know about an architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class LinearSlice(NamedTuple):
    """A slice of the output features of a linear.

    module: path of the linear in ComfyUI's diffusion model.
    offset, size: features [offset * hidden_size, (offset + size) * hidden_size); size None for all features.
    """

    module: str
    offset: int = 0
    size: int | None = None


class Block(NamedTuple):
    """A transformer block.

    path: module path of the block.
    qkv: path of the linear whose output starts with Q, K and V of the image tokens, each hidden_size features wide.
    joint_sequence: True if `qkv` runs on [text tokens, image tokens], False if it runs on image tokens only.
    identity_forward: replacement forward that skips the block.
    """

    path: str
    qkv: str
    joint_sequence: bool
    identity_forward: Callable[..., Any]


class Family(ABC):
    """A model architecture. All its models share one instance; `diffusion_model` is ComfyUI's network of one of them.

    name: display name. text_encoders: ComfyUI's attribute names of the text encoders in its CLIP.
    context_encoder: text encoder whose i-th output token is the i-th text token of the model.
    fingerprint_parameter: name of a small parameter whose values distinguish the family's models.
    vital_layers: indices of the vital blocks (Stable Flow) of the family's main model; empty if unknown.
    """

    name: str
    text_encoders: frozenset[str]
    context_encoder: str
    fingerprint_parameter: str
    vital_layers: tuple[int, ...] = ()

    def __deepcopy__(self, memo: object) -> Family:
        """The instance itself, which stays unique."""
        return self

    @abstractmethod
    def matches(self, diffusion_model: object) -> bool:
        """Whether the network is ComfyUI's implementation of this family."""

    @abstractmethod
    def lora_targets(self) -> dict[str, LinearSlice]:
        """Module name in adapter files, with dots -> the target in ComfyUI's model, for all known naming schemes."""

    @abstractmethod
    def acts_on_text_only(self, module: str) -> bool:
        """Whether the inputs of this linear are exactly the text tokens, so that an adapter can act on some of them."""

    @abstractmethod
    def tokenizer(self, embedding_directories: Sequence[str]) -> Any:
        """The object that a CLIP of this family has as `tokenizer`, made without loading model weights."""

    @abstractmethod
    def hidden_size(self, diffusion_model: Any) -> int:
        """Number of features of a token inside the model."""

    @abstractmethod
    def pooled_width(self, diffusion_model: Any) -> int:
        """Length of the pooled text embedding that the model takes."""

    @abstractmethod
    def text_modulations(self, diffusion_model: Any) -> list[str]:
        """Paths of the modules that return the text stream's modulations: (attention, mlp), each shift, scale, gate."""

    @abstractmethod
    def text_qkv(self, diffusion_model: Any) -> list[str]:
        """Paths of the linears that project text tokens to Q, K and V, one per block.

        Text tokens are the first tokens of the output; Q, K and V are its first 3 * hidden_size features.
        """

    @abstractmethod
    def blocks(self, diffusion_model: Any) -> list[Block]:
        """All transformer blocks in execution order, which is how papers count them."""

    @abstractmethod
    def image_grid(self, latent_shape: Sequence[int]) -> tuple[int, int]:
        """(height, width) in tokens of the sampled image, without reference latents."""

    def image_tokens(self, latent_shape: Sequence[int]) -> int:
        """Number of image tokens of the sampled image, without reference latents."""
        height, width = self.image_grid(latent_shape)
        return height * width

    @abstractmethod
    def block_index_of(self, options: Mapping[str, Any], diffusion_model: Any) -> int:
        """Index into blocks() of the running block. options: the extra_options that attention patches receive."""

    @abstractmethod
    def adapter_targets(self, adapter_type: str, diffusion_model: Any) -> list[str]:
        """Keys of lora_targets() that an adapter of this type ('STLoRA' or 'GSTLoRA') is trained on."""

    @abstractmethod
    def inplace_modified_inputs(self, diffusion_model: Any) -> list[str]:
        """Paths of modules whose inputs the model later modifies in place, so that autograd needs copies of them."""

    @abstractmethod
    def block_output_linears(self, diffusion_model: Any) -> list[str]:
        """Paths of the linears at the end of residual branches: out = x + gate * linear(h).

        Gradients with respect to earlier activations do not need their outputs, so gradient checkpointing need not
        recompute them, except where the gate is trainable or activations are float16.
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
        """The network's prediction of noise - data, of the shape and scale of `latent`, without ComfyUI's wrappers.

        latent: (batch, channels, height, width), in the model's scale. sigma, guidance: (batch,).
        text: (batch, tokens, width). pooled: (batch, pooled_width).
        references: reference latents, each (batch, channels, height, width), in the model's scale.
        """

    @abstractmethod
    def apply_rope(
        self, queries: torch.Tensor, keys: torch.Tensor, positions: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys with rotary position embedding. positions: the `pe` that attention patches receive.

        queries, keys: (batch, heads, tokens, head_dim) as attention patches receive them, text tokens first.
        """
