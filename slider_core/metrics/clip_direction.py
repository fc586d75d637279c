"""CLIP-dir: whether an image changes in the direction of the text (Kontinuous Kontext, arXiv 2510.08532, section 4).

With E_img and E_txt the projected embeddings of CLIP, and I_0 the source:

    CLIP-dir(I_k) = cosine(E_img(I_k) - E_img(I_0), E_txt(edit) - E_txt(source))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch.nn.functional import cosine_similarity

from ..errors import SliderError
from ..vision_features import vision_features
from .image_distance import check_images

_MIN_SOURCE_COSINE = 0.08
"""Cosine of the source and its prompt. CLIP-L gives 0.15 and more; unrelated 768-d vectors 0 with a std of 0.036."""


@dataclass(frozen=True)
class ClipScores:
    """One value per image.

    direction: CLIP-dir; None where the image equals the source. to_edit, to_source: cosine of the image and the prompt.
    """

    direction: tuple[float | None, ...]
    to_edit: tuple[float, ...]
    to_source: tuple[float, ...]


def clip_scores(
    images: torch.Tensor,
    vision: ClipVisionModel,
    clip: CLIP,
    source_prompt: str,
    edit_prompt: str,
    source_index: int = 0,
) -> ClipScores:
    """CLIP scores of images (n, height, width, 3) and the prompts that describe the source and the edited image.

    Raises SliderError unless vision and clip are the two parts of one CLIP-L, both with their projections.
    """
    check_images(images)
    if source_prompt.strip() == edit_prompt.strip():
        raise SliderError("source_prompt and edit_prompt are the same; expected descriptions of two different images.")
    embeddings = _image_embeddings(images, vision)
    source_text, edit_text = (
        _text_embedding(clip, text, embeddings.shape[-1]) for text in (source_prompt, edit_prompt)
    )
    cosine = cosine_similarity(embeddings[source_index], source_text, dim=-1).item()
    if not cosine >= _MIN_SOURCE_COSINE:
        raise SliderError(
            f"The source image and {source_prompt!r} have a cosine of {cosine:.3f}; expected at least "
            f"{_MIN_SOURCE_COSINE}. Either the text does not describe the image, or clip and clip_vision do not belong "
            "to one model: use OpenAI's CLIP-L for both, with a text encoder file that contains text_projection."
        )
    image_changes, text_change = embeddings - embeddings[source_index], edit_text - source_text
    return ClipScores(
        tuple(
            cosine_similarity(change, text_change, dim=-1).item() if change.any() else None for change in image_changes
        ),
        tuple(cosine_similarity(embeddings, edit_text, dim=-1).tolist()),
        tuple(cosine_similarity(embeddings, source_text, dim=-1).tolist()),
    )


def _image_embeddings(images: torch.Tensor, vision: ClipVisionModel) -> torch.Tensor:
    """Projected embeddings (n, width), float64."""
    if vision.model_type != "clip_vision_model" or "projection_dim" not in vision.config:
        raise SliderError(
            f"clip_vision is of type {vision.model_type}; only CLIP can compare text with images. Load CLIP-L's vision "
            "model, or disconnect clip."
        )
    return vision_features(images, vision, crop=True).double()


@torch.inference_mode()
def _text_embedding(clip: CLIP, text: str, width: int) -> torch.Tensor:
    """CLIP-L's projected embedding (width,), float64; other encoders of the CLIP do not run."""
    encoder = getattr(clip.cond_stage_model, "clip_l", None)
    if encoder is None:
        raise SliderError(
            "This clip has no CLIP-L; connect one that has, such as the output of 'Load CLIP (Dual)' for FLUX.1."
        )
    _check_projection(encoder.transformer.text_projection.weight, width)
    tokens = clip.tokenize(text)
    clip.load_model(tokens)
    clip.cond_stage_model.reset_clip_options()
    encoder.set_clip_options({"execution_device": clip.patcher.load_device, "projected_pooled": True})
    try:
        _, pooled = encoder.encode_token_weights(tokens["l"])
    finally:
        clip.cond_stage_model.reset_clip_options()
    return pooled[0].double().cpu()


def _check_projection(weight: torch.Tensor, width: int) -> None:
    """Raise SliderError unless this is a trained text projection to `width`."""
    if weight.shape[0] != width:
        raise SliderError(
            f"The text embedding has a width of {weight.shape[0]}, the image embeddings of {width}: they do not belong "
            "to one CLIP model. Load CLIP-L's vision model (clip_vision_vit_l), or disconnect clip."
        )
    weight = weight.detach().float()
    missing = not torch.isfinite(weight).all() or not weight.any(-1).all()
    if missing or torch.equal(weight.cpu(), torch.eye(len(weight))):
        raise SliderError(
            "The text encoder file has no text_projection, so text and images have no common embedding space. Load a "
            "clip_l file that contains it, or disconnect clip."
        )
