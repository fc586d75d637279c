"""Vitality of the miniature model's layers, by the pack's own analysis."""

from __future__ import annotations

from pathlib import Path

import torch

from slider_core.stable_flow.vitality_search import LATENT_FEATURES, RenderPlan, VitalityScores, measure_vitality

from .evaluate import validation_tasks
from .slider_methods import GUIDANCE, STEPS, Miniature

SEED = 0


def layer_scores(models: Path, num_scenes: int, folder: Path) -> VitalityScores:
    """Bypass each layer in turn, on validation scenes with one edit each. Resumes from the scores in `folder`."""
    miniature = Miniature(models)
    tasks = validation_tasks(num_scenes, 1)
    latents = [miniature.latent(source) for source, _ in tasks]
    prompts = {
        f"{number}: {edit.instruction}": miniature.edit_conditioning(miniature.prompt([edit.instruction]), latent)
        for number, ((_, [edit]), latent) in enumerate(zip(tasks, latents))
    }
    plan = RenderPlan(prompts, [SEED], torch.zeros_like(latents[0]), STEPS)
    settings = {"guidance": GUIDANCE, "compared by": LATENT_FEATURES.name}
    return measure_vitality(miniature.model, plan, LATENT_FEATURES, f"{folder}/miniature", settings)
