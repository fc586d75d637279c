"""One model call through ComfyUI's own conditioning code, without a sampler."""

from __future__ import annotations

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal noise that depends only on shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compiled(model: ModelPatcher) -> ModelPatcher:
    """A clone compiled with torch.compile; the eager backend skips the slow code generation."""
    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager", dynamic=False)
    return model


def velocity_of(model: ModelPatcher, x: torch.Tensor, sigma: float, *conditionings: list) -> torch.Tensor:
    """Velocities (len(conditionings) * batch, 16, H, W), one batch per conditioning in the order given."""
    options = model.model_options | {"transformer_options": dict(model.model_options["transformer_options"])}
    conds = {str(k): comfy.sampler_helpers.convert_cond(c) for k, c in enumerate(conditionings)}
    comfy.sampler_helpers.prepare_model_patcher(model, conds, options)
    model.pre_run()
    conds = comfy.samplers.process_conds(model.model, x, conds, x.device, x, None, seed=0)
    sigmas = torch.full((x.shape[0],), sigma)
    denoised = comfy.samplers.calc_cond_batch(model.model, list(conds.values()), x, sigmas, options)
    return torch.cat([x - denoised_x for denoised_x in denoised]) / sigma
