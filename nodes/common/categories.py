"""Categories of the pack's nodes in ComfyUI's node menu."""

from __future__ import annotations

PROMPT = "edit sliders/prompt"
ADAPTERS = "edit sliders/adapters"
TRAINING_FREE = "edit sliders/training-free"
STABLE_FLOW = "edit sliders/stable flow"
SWEEP = "edit sliders/sweep"
ANALYSIS = "edit sliders/analysis"
