"""A source prompt and edit prompts as one batch.

Source: Stable Flow, arXiv 2411.14430, section 3: the source and its edits are sampled in parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from comfy.conds import CONDRegular

from ..errors import SliderError
from ..families import family_of_encoders
from ..types import Conditioning
from .encode import T5_TRAINING_TOKENS
from .token_spans import tokenizers

if TYPE_CHECKING:
    from comfy.sd import CLIP


def split_prompts(lines: str) -> list[str]:
    """Split text into prompts, one per line; empty lines are skipped. Raises SliderError if there are none."""
    prompts = [line.strip() for line in lines.splitlines() if line.strip()]
    if not prompts:
        raise SliderError("There is no prompt; expected one prompt per line. Enter at least one.")
    return prompts


def batch_prompts(clip: CLIP, prompts: Sequence[str], guidances: Sequence[float]) -> Conditioning:
    """Encode one prompt per image of the batch into a single conditioning entry, with a guidance value per image.

    The entry's text tokens have shape (prompts, tokens, width) and its pooled_output (prompts, width). Prompts are
    padded to 512 tokens, or to the longest prompt if that is longer.
    Raises SliderError for text encoders of an unsupported model, for a CLIP with scheduled hooks, and if the prompts
    cannot be padded to the same length.
    """
    encoder = family_of_encoders(set(tokenizers(clip))).context_encoder

    def encode(prompt: str, min_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = clip.tokenize(prompt, tokenizer_options={f"{encoder}_min_length": min_tokens})
        conditioning = clip.encode_from_tokens_scheduled(tokens)
        if len(conditioning) != 1:
            raise SliderError(
                f"The text encoders return {len(conditioning)} conditionings for {prompt!r}, one for each range of the "
                "schedule; expected one. Remove the scheduled hooks from the CLIP."
            )
        [[cond, options]] = conditioning
        return cond, options["pooled_output"]

    encoded = [encode(prompt, T5_TRAINING_TOKENS) for prompt in prompts]
    longest = max(cond.shape[1] for cond, _ in encoded)
    encoded = [e if e[0].shape[1] == longest else encode(prompt, longest) for e, prompt in zip(encoded, prompts)]
    conds, pooled = zip(*encoded)
    lengths = [cond.shape[1] for cond in conds]
    if len(set(lengths)) > 1:
        raise SliderError(
            f"The prompts cannot be padded to the same length: the text encoder {encoder} returns {lengths} tokens for "
            f"them; expected {longest} for each. Use a CLIP without nodes that change its padding, or prompts of "
            "similar length."
        )
    options = {
        "pooled_output": torch.cat(pooled),
        "guidance": None,
        "model_conds": {"guidance": CONDRegular(torch.tensor(guidances, dtype=torch.float32))},
    }
    return [[torch.cat(conds), options]]
