"""Gradient checkpointing of transformer blocks, and what makes it exact through ComfyUI's in-place operations.

ComfyUI's blocks write into their inputs. Plain autograd raises an error there; under checkpointing it does not, and
the gradients are silently wrong. So every input that is modified in place is copied first.

A checkpointed block stores its inputs and the results of its attention kernels, whose cost grows with the square of the
sequence length. The backward pass recomputes the rest of the block, except the matrix products of its output linears
(`Family.block_output_linears`): the gradient of a frozen linear needs its weight, not its result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from slider_core.patching.forward_patches import Forward

_ATTENTION_KERNELS = [
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

_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)
"""Whether the running block is being recomputed in the backward pass."""


def copy_input(forward: Forward) -> Forward:
    """Call a module with one argument on a copy of it."""

    def run(x: torch.Tensor) -> torch.Tensor:
        return forward(x.clone())

    return run


def copy_inputs(forward: Forward) -> Forward:
    """Call a module on copies of all its tensor arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*map(_copied, args), **{key: _copied(value) for key, value in kwargs.items()})

    return run


def checkpoint_block(forward: Forward) -> Forward:
    """Checkpoint a block and call it on copies of its inputs; without gradients, call it as it is."""
    run_on_copies = copy_inputs(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(
            run_on_copies,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_forward_and_recompute_contexts,
            **kwargs,
        )

    return run


def skip_recomputation(forward: Forward) -> Forward:
    """Run an output linear of a block without its matrix product while the block is recomputed.

    Only for outputs whose value no gradient depends on; see `Family.block_output_linears`.
    """

    def run(x: torch.Tensor) -> torch.Tensor:
        if not _recomputing.get():
            return forward(x)
        with _NoMatmul():
            return forward(x)

    return run


def _forward_and_recompute_contexts() -> tuple[
    contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]
]:
    store, reuse = create_selective_checkpoint_contexts(_ATTENTION_KERNELS)
    return store, _recompute(reuse)


@contextlib.contextmanager
def _recompute(stored_attention: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        with stored_attention:
            yield
    finally:
        _recomputing.reset(token)


class _NoMatmul(TorchDispatchMode):
    """Replaces matrix products with NaN of the same shape, so that an accidental use of the result shows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            return func(*args, **(kwargs or {}))
        left, right = args[-2:]
        return left.new_full((left.shape[0], right.shape[1]), torch.nan)


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
