"""Image embeddings of ComfyUI's vision models: CLIP, SigLIP, DINOv2, DINOv3."""

from __future__ import annotations

import torch
from comfy.clip_vision import ClipVisionModel

_BATCH_SIZE = 8


@torch.inference_mode()
def vision_features(
    images: torch.Tensor, vision: ClipVisionModel, crop: bool = False, average_tokens: bool = True
) -> torch.Tensor:
    """Embeddings (n, width), float32, of images (n, height, width, channels).

    crop: use the central square of each image, as CLIP was trained, instead of squeezing the image into a square.
    average_tokens: average the image embedding of models that give one vector per image token (SigLIP); else they are
    concatenated. Models without an image embedding (DINOv2, DINOv3) give the mean of their last hidden state.
    """
    features = []
    for batch in images.split(_BATCH_SIZE):
        output = vision.encode_image(batch[..., :3], crop=crop)
        embedding = output["image_embeds"]
        if embedding is None:
            embedding = output["last_hidden_state"].mean(1)
        elif embedding.ndim == 3:
            embedding = embedding.mean(1) if average_tokens else embedding.flatten(1)
        features.append(embedding.float())
    return torch.cat(features)
