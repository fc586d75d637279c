"""The pack's nodes: a schema and a few lines each."""

from __future__ import annotations

from comfy_api.latest import io

from . import (
    adapters,
    calibration,
    flowslider,
    inversion,
    layer_analysis,
    mask_and_schedule,
    prompts,
    slider_prompt,
    source_kv_cache,
    stable_flow,
    strength_projector,
    sweep_grid,
    sweep_metrics,
    sweeps,
    training_free,
)

NODES: list[type[io.ComfyNode]] = [
    *slider_prompt.NODES,
    *prompts.NODES,
    *mask_and_schedule.NODES,
    *adapters.NODES,
    *strength_projector.NODES,
    *training_free.NODES,
    *flowslider.NODES,
    *stable_flow.NODES,
    *source_kv_cache.NODES,
    *inversion.NODES,
    *layer_analysis.NODES,
    *sweeps.NODES,
    *sweep_grid.NODES,
    *sweep_metrics.NODES,
    *calibration.NODES,
]
