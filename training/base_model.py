"""The frozen model that adapters are trained on, as ComfyUI loads it, with exact gradients through it.

ComfyUI's blocks overwrite their inputs. Plain autograd refuses that, and checkpointing hides it and gives wrong
gradients; here everything that is overwritten is copied first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from slider_core.families import Family, family_of
from slider_core.families.network import diffusion_model_of
from slider_core.patching.forward_patches import Forward, ForwardWrapper, patched_forwards

_ACTIVATION_BYTES = 34
"""Per token and unit of width, of what one block keeps for its backward pass."""

_ATTENTIONS = [
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(torch.ops.aten, name)
]

_again: ContextVar[bool] = ContextVar("again", default=False)
"""Whether a block runs once more, for its backward pass."""


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
        width = self.family.width(self.network)
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
        copies = dict.fromkeys(self.family.inplace_modified_inputs(self.network), _on_a_copy)
        wrap = _checkpointed if self.checkpointing else _on_copies
        blocks = dict.fromkeys((block.path for block in self.family.blocks(self.network)), wrap)
        uses_results = self.dtype == torch.float16  # ComfyUI passes those of blocks through nan_to_num
        last = self.family.block_output_linears(self.network) if self.checkpointing and not uses_results else []
        ends = dict.fromkeys(last, _once)
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


def _on_a_copy(forward: Forward) -> Forward:
    def run(x: torch.Tensor) -> torch.Tensor:
        return forward(x.clone())

    return run


def _on_copies(forward: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*map(_copied, args), **{key: _copied(value) for key, value in kwargs.items()})

    return run


def _checkpointed(forward: Forward) -> Forward:
    run_on_copies = _on_copies(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(
            run_on_copies,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_first_and_again,
            **kwargs,
        )

    return run


def _first_and_again() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """What a block runs in at first and for its backward pass."""
    keeping, kept = create_selective_checkpoint_contexts(_ATTENTIONS)
    return keeping, _running_again(kept)


@contextlib.contextmanager
def _running_again(kept: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    token = _again.set(True)
    try:
        with kept:
            yield
    finally:
        _again.reset(token)


def _once(forward: Forward) -> Forward:
    def run(x: torch.Tensor) -> torch.Tensor:
        if not _again.get():
            return forward(x)
        with _WithoutProducts():
            return forward(x)

    return run


class _WithoutProducts(TorchDispatchMode):
    """A frozen linear has its gradient and not its result, which is NaN so that nobody can depend on it unnoticed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            return func(*args, **(kwargs or {}))
        left, right = args[-2:]
        return left.new_full((left.shape[0], right.shape[1]), torch.nan)


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
