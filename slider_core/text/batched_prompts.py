"""A source prompt and its edits as one batch (Stable Flow, section 3: source and edits are generated in parallel)."""

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
    """One prompt per line. Raises SliderError when there is none."""
    prompts = [line.strip() for line in lines.splitlines() if line.strip()]
    if not prompts:
        raise SliderError("There is no prompt; expected at least one, one per line.")
    return prompts


def batch_prompts(clip: CLIP, prompts: Sequence[str], guidances: Sequence[float]) -> Conditioning:
    """One conditioning with a prompt for each image of the batch, and a guidance of its own for each.

    cond: (prompts, rows, width), pooled_output: (prompts, width); texts are padded to 512 rows, or to the longest.
    Raises SliderError for text encoders of another family, and for prompts that do not become equally long.
    """
    encoder = family_of_encoders(set(tokenizers(clip))).context_encoder

    def encode(prompt: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = clip.tokenize(prompt, tokenizer_options={f"{encoder}_min_length": rows})
        scheduled = clip.encode_from_tokens_scheduled(tokens)
        if len(scheduled) != 1:
            raise SliderError(
                f"The text encoders give {len(scheduled)} conditionings for {prompt!r}, one per part of the schedule; "
                "expected one. Take hooks with a schedule off the CLIP."
            )
        [[cond, options]] = scheduled
        return cond, options["pooled_output"]

    encoded = [encode(prompt, T5_TRAINING_TOKENS) for prompt in prompts]
    longest = max(cond.shape[1] for cond, _ in encoded)
    encoded = [e if e[0].shape[1] == longest else encode(prompt, longest) for e, prompt in zip(encoded, prompts)]
    conds, pooled = zip(*encoded)
    lengths = [cond.shape[1] for cond in conds]
    if len(set(lengths)) > 1:
        raise SliderError(
            f"The prompts cannot be padded to one length: the text encoder {encoder} makes {lengths} rows of them, "
            f"whatever is asked for; expected {longest} of each. Use a CLIP without nodes that change its padding, or "
            "prompts of like length."
        )
    options = {
        "pooled_output": torch.cat(pooled),
        "guidance": None,
        "model_conds": {"guidance": CONDRegular(torch.tensor(guidances, dtype=torch.float32))},
    }
    return [[torch.cat(conds), options]]
