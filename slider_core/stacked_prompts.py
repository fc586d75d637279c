"""A source prompt and its edits as one batch (Stable Flow, section 3: source and edits are generated in parallel)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from comfy.conds import CONDRegular

from .errors import SliderError
from .families import family_of_encoders
from .span_conditioning import TRAINING_LENGTH
from .span_strengths import Conditioning
from .token_spans import encoders

if TYPE_CHECKING:
    from comfy.sd import CLIP


def stack_prompts(clip: CLIP, prompts: Sequence[str], guidances: Sequence[float]) -> Conditioning:
    """One conditioning with a prompt for each image of the batch, and a guidance of its own for each.

    cond: (prompts, rows, width), pooled_output: (prompts, width); texts are padded to 512 rows, or to the longest.
    Raises SliderError for fewer than two prompts, or text encoders of another family.
    """
    if len(prompts) < 2:
        raise SliderError("There is no edit prompt; expected the source prompt and at least one edit, one per line.")
    encoder = family_of_encoders(set(encoders(clip))).text_rows

    def encode(prompt: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = clip.tokenize(prompt, tokenizer_options={f"{encoder}_min_length": rows})
        [[cond, options]] = clip.encode_from_tokens_scheduled(tokens)
        return cond, options["pooled_output"]

    encoded = [encode(prompt, TRAINING_LENGTH) for prompt in prompts]
    longest = max(cond.shape[1] for cond, _ in encoded)
    encoded = [e if e[0].shape[1] == longest else encode(prompt, longest) for e, prompt in zip(encoded, prompts)]
    conds, pooled = zip(*encoded)
    options = {
        "pooled_output": torch.cat(pooled),
        "guidance": None,
        "model_conds": {"guidance": CONDRegular(torch.tensor(guidances, dtype=torch.float32))},
    }
    return [[torch.cat(conds), options]]
