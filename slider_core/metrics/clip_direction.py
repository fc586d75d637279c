"""Pictures and words in CLIP's common space: whether a picture moves the way the words do (CLIP-dir)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch.nn.functional import cosine_similarity

from ..errors import SliderError
from .image_distance import check_images, vision_features

_LEAST_LIKENESS = 0.08
"""Of the source and its words; CLIP-L gives 0.15 and more, vectors of two spaces 0 with a deviation of 0.036."""


@dataclass(frozen=True)
class ClipMeasures:
    """One value per picture. direction: cosine(E_img(k) - E_img(source), E_txt(edit) - E_txt(source)), None where the
    picture is the source (Kontinuous Kontext, section 4). to_edit, to_source: cosine of picture and words.
    """

    direction: tuple[float | None, ...]
    to_edit: tuple[float, ...]
    to_source: tuple[float, ...]


def clip_measures(
    images: torch.Tensor, vision: ClipVisionModel, clip: CLIP, source_words: str, edit_words: str, source: int = 0
) -> ClipMeasures:
    """How pictures (n, h, w, 3) go along with the words that describe the source and the edited picture.

    Raises SliderError where vision and clip are not the two halves of one CLIP-L, both with their projections.
    """
    check_images(images)
    if source_words.strip() == edit_words.strip():
        raise SliderError("The words for source and edit are the same; expected two descriptions of pictures.")
    seen = _seen(images, vision)
    before, after = _said(clip, source_words, seen.shape[-1]), _said(clip, edit_words, seen.shape[-1])
    likeness = cosine_similarity(seen[source], before, dim=-1).item()
    if not likeness >= _LEAST_LIKENESS:
        raise SliderError(
            f"The source and its words {source_words!r} have a cosine of {likeness:.3f}; expected {_LEAST_LIKENESS} or "
            "more. Either the words do not describe the picture, or clip and clip_vision do not come from one model: "
            "use OpenAI's CLIP-L for both, with a text encoder file that contains text_projection."
        )
    moved, words = seen - seen[source], after - before
    return ClipMeasures(
        tuple(cosine_similarity(one, words, dim=-1).item() if one.any() else None for one in moved),
        tuple(cosine_similarity(seen, after, dim=-1).tolist()),
        tuple(cosine_similarity(seen, before, dim=-1).tolist()),
    )


def _seen(images: torch.Tensor, vision: ClipVisionModel) -> torch.Tensor:
    if vision.model_type != "clip_vision_model" or "projection_dim" not in vision.config:
        raise SliderError(
            f"clip_vision is of type {vision.model_type}; words can be compared with pictures by CLIP only. "
            "Load CLIP-L's vision model, or leave clip unlinked."
        )
    return vision_features(images, vision, crop=True).double()


@torch.inference_mode()
def _said(clip: CLIP, words: str, width: int) -> torch.Tensor:
    """CLIP-L's projected embedding of words, (width,); other encoders of the CLIP do not run."""
    encoder = getattr(clip.cond_stage_model, "clip_l", None)
    if encoder is None:
        raise SliderError("This clip has no CLIP-L; link one that has, such as DualCLIPLoader's for FLUX.1.")
    _check_projection(encoder.transformer.text_projection.weight, width)
    tokens = clip.tokenize(words)
    clip.load_model(tokens)
    clip.cond_stage_model.reset_clip_options()
    encoder.set_clip_options({"execution_device": clip.patcher.load_device, "projected_pooled": True})
    try:
        _, pooled = encoder.encode_token_weights(tokens["l"])
    finally:
        clip.cond_stage_model.reset_clip_options()
    return pooled[0].double().cpu()


def _check_projection(weight: torch.Tensor, width: int) -> None:
    if weight.shape[0] != width:
        raise SliderError(
            f"The words' embedding is {weight.shape[0]} wide and the pictures' {width}: they are not of one CLIP. "
            "Load CLIP-L's vision model (clip_vision_vit_l), or leave clip unlinked."
        )
    numbers = weight.detach().float()
    missing = not torch.isfinite(numbers).all() or not numbers.any(-1).all()
    if missing or torch.equal(numbers.cpu(), torch.eye(len(numbers))):
        raise SliderError(
            "The text encoder file has no text_projection, so words and pictures have no space in common. Load a "
            "clip_l file that contains it, or leave clip unlinked."
        )
