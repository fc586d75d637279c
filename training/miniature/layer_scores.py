"""Which layers of the miniature model are vital for edits, by the pack's own analyser."""

from __future__ import annotations

from pathlib import Path

import torch

from slider_core.stable_flow.vitality_search import LATENT_FEATURES, RenderPlan, VitalityScores, measure_vitality

from .evaluate import held_out_tasks
from .slider_methods import GUIDANCE, STEPS, Miniature

SEED = 0


def layer_scores(models: Path, scenes: int, folder: Path) -> VitalityScores:
    """Every layer left out in turn, over held-out scenes with one edit each; scores so far are kept in `folder`."""
    it = Miniature(models)
    tasks = held_out_tasks(scenes, 1)
    latents = [it.latent(source) for source, _ in tasks]
    prompts = {
        f"{number}: {edit.instruction}": it.beside(it.prompt([edit.instruction]), latent)
        for number, ((_, [edit]), latent) in enumerate(zip(tasks, latents))
    }
    empty = torch.zeros_like(latents[0])
    plan, settings = (
        RenderPlan(prompts, [SEED], empty, STEPS),
        {"guidance": GUIDANCE, "compared by": LATENT_FEATURES.name},
    )
    return measure_vitality(it.model, plan, LATENT_FEATURES, f"{folder}/miniature", settings)
