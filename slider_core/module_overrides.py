"""The one way in which this pack changes a model: forwards of single modules, overridden for one model call.

One APPLY_MODEL wrapper per patched ModelPatcher runs a list of operations. Each names the modules it wraps for this
call; their forwards are restored when the call ends, whatever ends it. Weights, classes and the diffusion model itself
are never touched, so branches, bypassed nodes and interrupted runs cannot leak.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

COND_PREFIX = "edit_sliders."
"""Tensors in a cond's `model_conds` under names with this prefix reach the operations and nobody else."""

_KEY = "edit_sliders"

Around = Callable[..., Any]
"""Called as around(forward, *args, **kwargs) in place of the module's forward(*args, **kwargs)."""


@dataclass(frozen=True)
class ModelCall:
    """What one model call is about.

    conds: our tensors of the conds in this call, first dimension batch * conds (images vary fastest).
    images: images in the latent batch; count: conds that share this call.
    """

    conds: Mapping[str, torch.Tensor]
    images: int
    count: int
    device: torch.device


class Operation(Protocol):
    """A change to the model. `side_model` holds its weights, moved by ComfyUI together with the model, or is None."""

    side_model: ModelPatcher | None

    def around(self, call: ModelCall) -> Mapping[str, Around]:
        """Module path inside the diffusion model -> what to put around its forward; empty = leave the call alone."""
        ...


def add_operation(model: ModelPatcher, operation: Operation) -> ModelPatcher:
    """A clone of `model` that also runs `operation`, after those it already has. `model` itself is not changed."""
    patched = model.clone()
    operations = (*(patched.get_attachment(_KEY) or ()), operation)
    patched.set_attachments(_KEY, operations)
    patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, _KEY)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, partial(_run, operations))
    side_models = [op.side_model.clone() for op in operations if op.side_model is not None]
    patched.set_additional_models(_KEY, side_models)
    return patched


def _run(operations: tuple[Operation, ...], executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    conds = {key: kwargs.pop(key).to(x.device) for key in list(kwargs) if key.startswith(COND_PREFIX)}
    options = next((a for a in args if isinstance(a, dict)), kwargs.get("transformer_options", {}))
    count = len(options.get("cond_or_uncond", (0,)))
    call = ModelCall(conds, x.shape[0] // count, count, x.device)
    model = executor.class_obj.diffusion_model
    model = getattr(model, "_orig_mod", model)
    with contextlib.ExitStack() as stack:
        for operation in operations:
            for path, around in operation.around(call).items():
                stack.enter_context(_overridden(model.get_submodule(path), around))
        return executor(x, *args, **kwargs)


@contextlib.contextmanager
def _overridden(module: torch.nn.Module, around: Around) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = partial(around, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
