"""Every key that slider_core puts on a ModelPatcher, into a conditioning's dict or `model_conds`, or into
transformer_options.

No other file of slider_core may spell such a key; tests/test_architecture.py checks it.
"""

from __future__ import annotations

PATCHES = "edit_sliders"
"""Attachment, wrapper, callback and additional-models key of the pack's patches on a ModelPatcher."""
BATCH_SPLITTING = "edit_sliders.batch_splitting"
"""Wrapper key of Split Batch."""
SAMPLER_CHECK = "edit_sliders.sampler_check"
"""Wrapper key of the check for samplers that add noise."""
SAMPLED_SHAPE_WRAPPER = "edit_sliders.sampled_shape"
"""Wrapper key of the wrapper that records SAMPLED_SHAPE."""

# In the dict of a conditioning entry: the objects that carry strengths (see conditioning/outside_strength.py).
SPANNED_TEXT = "edit_sliders"
PROJECTOR = "edit_sliders_projector"
PROMPT_WEIGHTS = "edit_sliders_prompt_weights"

# In `model_conds`, which ComfyUI batches and passes to the model call. Keys with this prefix are consumed by the
# pack's APPLY_MODEL wrapper; a model without it receives them as unused keyword arguments.
COND_PREFIX = "edit_sliders."
SCHEDULE_RANGE = COND_PREFIX + "schedule_range"
"""(start, end) of the schedule that the entry was made for."""
PROJECTOR_OFFSETS = COND_PREFIX + "projector_offsets"
"""Offsets of scale and shift, (batch, 2 * hidden_size)."""
OUTSIDE_STRENGTH = COND_PREFIX + "outside_strength"
"""An OutsideStrength. The next three replace an entry's own strengths while it applies."""
OUTSIDE_SUPPRESSION = COND_PREFIX + "outside_strength.suppression"
OUTSIDE_PADDING = COND_PREFIX + "outside_strength.padding"
OUTSIDE_OFFSETS = COND_PREFIX + "outside_strength.projector_offsets"
DEFAULT_SUPPRESSION = COND_PREFIX + "default_suppression"
"""Suppression of the tokens, and number of padding tokens, for the channels that have none of their own."""
DEFAULT_PADDING = COND_PREFIX + "default_padding"
BATCH_SIZE_CHECK = COND_PREFIX + "batch_size_check"
"""Never read: lets ComfyUI refuse a batch that per-image masks or weights do not fit."""


def suppression(channel: str) -> str:
    """Key of the suppression (1 - strength) of every text token, (batch, tokens), on one channel."""
    return f"{COND_PREFIX}suppression.{channel}"


def padding(channel: str) -> str:
    """Key of the number of padding tokens at the end of the text that a channel's spans were found on, (1, 1)."""
    return f"{COND_PREFIX}padding.{channel}"


# In transformer_options.
BATCH_SLICE = "edit_sliders.batch_slice"
"""The BatchSlice that a model call computes when Split Batch splits the batch."""
SAMPLED_SHAPE = "edit_sliders.sampled_shape"
"""Shape of the whole latent that is being sampled."""
