"""Vital layers: key/value injection from a source image into its edits (Stable Flow, arXiv 2411.14430, section 3.2).

Source and edits are one batch. In the vital transformer blocks, the image tokens' keys and values of every image k
become those of the source:

    K_k <- K_k + w (K_source - K_k)        V_k <- V_k + w (V_source - V_k)

with w = 1 in the paper; here w is a strength (0 to 1) times the mask's value at the token. Queries are not changed, and
text tokens and reference latents keep their own K and V.

Block indices count as in the paper: double-stream blocks first, then single-stream blocks (0 to 18 and 19 to 56 in
FLUX.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .. import keys
from .. import node_names as names
from ..conditioning.active_region import EVERYWHERE, ActiveRegion
from ..conditioning.masks import mask_coverage, validate_single_mask
from ..errors import SliderError
from ..families import Block, family_of
from ..families.network import diffusion_model_of
from ..int_ranges import parse_int_ranges
from ..patching.forward_patches import Forward, ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch
from ..sampling.deterministic_samplers import refuse_noise_adding_samplers

WriteKV = Callable[[int, torch.Tensor], None]
"""(i, kv): modifies kv, a view of shape (batch, tokens, 2 * hidden) of the image tokens' K and V in the i-th block."""


class KVSlots:
    """The K and V of the image tokens in some blocks of a model: output features of each block's QKV linear."""

    def __init__(self, model: ModelPatcher, block_indices: Sequence[int]):
        self.family, self.blocks = family_of(model), select_blocks(model, block_indices)
        self.hidden_size = self.family.hidden_size(diffusion_model_of(model.model))

    def shape(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """(blocks, image tokens, 2 * hidden) of one image's K and V."""
        return len(self.blocks), self.family.image_tokens(latent_shape), 2 * self.hidden_size

    def forward_wrappers(self, context: ForwardContext, write: WriteKV) -> Mapping[str, ForwardWrapper]:
        """Wrappers of the QKV linears that let `write` modify K and V as soon as a block has computed them."""
        num_tokens, features = (
            self.family.image_tokens(context.latent_shape),
            slice(self.hidden_size, 3 * self.hidden_size),
        )
        wrappers = {}
        for index, block in enumerate(self.blocks):
            first = context.num_text_tokens if block.joint_sequence else 0
            wrappers[block.qkv] = _writing_wrapper(write, index, slice(first, first + num_tokens), features)
        return wrappers


def _writing_wrapper(write: WriteKV, index: int, tokens: slice, features: slice) -> ForwardWrapper:
    def wrap(forward: Forward) -> Forward:
        def forward_and_write(x: torch.Tensor) -> torch.Tensor:
            qkv = forward(x)
            write(index, qkv[:, tokens, features])
            return qkv

        return forward_and_write

    return wrap


class InjectionWeight:
    """The weight w of the source's K and V: strength (0 = own, 1 = the source's), within an active region.

    Raises SliderError for an invalid mask, or several masks.
    """

    def __init__(self, strength: float, region: ActiveRegion):
        self.strength, self.region = strength, region
        self.mask = None if region.mask is None else validate_single_mask(region.mask)

    def is_active(self, context: ForwardContext) -> bool:
        """Whether anything is injected in this model call."""
        return self.strength != 0 and context.within(self.region.start, self.region.end)

    def token_weights(self, slots: KVSlots, context: ForwardContext) -> torch.Tensor:
        """The weight of all image tokens, shape (), or with a mask of each one, shape (tokens, 1)."""
        weight = torch.tensor(self.strength)
        if self.mask is not None:
            _check_full_area(context)
            weight = weight * mask_coverage(
                self.mask, context.latent_shape, slots.family.image_grid(context.latent_shape)
            )
        return weight.to(context.device)

    def add_sampling_checks(self, model: ModelPatcher) -> ModelPatcher:
        """Make `model` (modified in place) refuse noise-adding samplers and, with a mask, conditioning areas."""
        refuse_noise_adding_samplers(model)
        if self.mask is not None:
            model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, keys.SAMPLED_SHAPE_WRAPPER)
            model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, keys.SAMPLED_SHAPE_WRAPPER, _record_sampled_shape)
        return model


def _record_sampled_shape(
    executor: Any,
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any],
    callback: Any,
    noise: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    model_options = extra_args["model_options"]
    transformer_options = {**model_options["transformer_options"], keys.SAMPLED_SHAPE: tuple(noise.shape)}
    extra_args = {**extra_args, "model_options": {**model_options, "transformer_options": transformer_options}}
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def _check_full_area(context: ForwardContext) -> None:
    sampled, covered = (
        context.inputs.transformer_options.get(keys.SAMPLED_SHAPE, context.latent_shape)[-2:],
        context.latent_shape[-2:],
    )
    if tuple(sampled) != tuple(covered):
        raise SliderError(
            f"A conditioning covers {covered[1]} x {covered[0]} of a latent of {sampled[1]} x {sampled[0]}, so the "
            "mask for keeping the source would be misaligned; expected the entire latent. Remove the area from the "
            f"conditioning, or the mask from '{names.KEEP_SOURCE}'."
        )


class KVInjection(ModelPatch):
    """Replaces K and V of the image tokens of every image with those of the source image in the same batch.

    chained: each image but the first takes them from the image before it instead of from the source.
    """

    phase = Phase.REPLACE

    def __init__(self, slots: KVSlots, source_index: int, weight: InjectionWeight, chained: bool):
        self.slots, self.source_index, self.weight, self.chained = slots, source_index, weight, chained

    @property
    def sort_key(self) -> tuple[Any, ...]:
        return ("within the batch", self.chained, self.source_index)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        if context.num_images < 2:
            raise SliderError(
                "The batch has one image; expected source and edits in one batch, from "
                f"'{names.BATCH_PROMPTS}' and '{names.REPEAT_LATENT_SAME_NOISE}'. To keep a source that is not in the "
                f"batch, use '{names.KEEP_CACHED_SOURCE}'."
            )
        if not self.source_index < context.num_images:
            raise SliderError(
                f"source_index is {self.source_index}, but the batch has {context.num_images} images; expected 0 to "
                f"{context.num_images - 1}."
            )
        if not self.weight.is_active(context):
            return {}
        images, source_index, chained = context.num_images, self.source_index, self.chained
        weights = self.weight.token_weights(self.slots, context)

        def inject(_: int, kv: torch.Tensor) -> None:
            kv = kv.unflatten(0, (-1, images))
            if chained:
                kv[:, 1:].lerp_(kv[:, :-1].clone(), weights.to(kv))
            else:
                kv.lerp_(kv[:, source_index : source_index + 1].clone(), weights.to(kv))

        return self.slots.forward_wrappers(context, inject)


def inject_key_values(
    model: ModelPatcher,
    block_indices: Sequence[int],
    source_index: int = 0,
    strength: float = 1.0,
    region: ActiveRegion = EVERYWHERE,
    chained: bool = False,
) -> ModelPatcher:
    """A clone of `model` that samples a batch with the source image's K and V in some blocks.

    source_index: index of the source in the batch. strength: 0 = own K and V, 1 = the source's. region: with one mask.
    chained: each image takes K and V from the image before it, ignoring source_index (a chain of edits, section 4.4).
    Raises SliderError for a block that the model does not have and for invalid or several masks; when sampling, for a
    batch of one, for samplers that add noise, and for a mask combined with a conditioning area.
    """
    weight = InjectionWeight(strength, region)
    slots = KVSlots(model, block_indices)
    return weight.add_sampling_checks(add_patch(model, KVInjection(slots, source_index, weight, chained)))


class BlockBypass(ModelPatch):
    """Skips some blocks: their inputs pass through unchanged."""

    phase = Phase.REPLACE

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = blocks

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        return {block.path: _identity_wrapper(block) for block in self.blocks}


def _identity_wrapper(block: Block) -> ForwardWrapper:
    return lambda forward: block.identity_forward


def bypass_blocks(model: ModelPatcher, block_indices: Sequence[int]) -> ModelPatcher:
    """A clone of `model` that skips some blocks. Raises SliderError for a block that the model does not have."""
    return add_patch(model, BlockBypass(select_blocks(model, block_indices)))


LAYER_SETS: Mapping[str, Callable[[Sequence[int], Sequence[int]], list[int]]] = {
    "vital layers": lambda vital, every: list(vital),
    "vital layers without layer 2": lambda vital, every: [index for index in vital if index != 2],
    "all layers": lambda vital, every: list(every),
    "all but the vital layers": lambda vital, every: [index for index in every if index not in vital],
}
"""Name, as saved in workflows, -> (vital block indices, all block indices) -> the block indices of the set.

The published code leaves block 2 out of the vital layers."""


def layer_set(model: ModelPatcher, name: str) -> list[int]:
    """Block indices of one of LAYER_SETS, with the vital layers of the model's family."""
    return LAYER_SETS[name](family_of(model).vital_layers, range(block_count(model)))


def block_count(model: ModelPatcher) -> int:
    """Number of transformer blocks."""
    return len(family_of(model).blocks(diffusion_model_of(model.model)))


def parse_block_indices(text: str) -> list[int]:
    """Block indices from text such as '0, 1, 17-18'. Raises SliderError for empty or invalid text."""
    indices = parse_int_ranges(text, "layer", "0, 1, 17-18")
    if not indices:
        raise SliderError("The list of layers is empty; expected numbers and ranges such as '0, 1, 17-18'.")
    return indices


def select_blocks(model: ModelPatcher, block_indices: Sequence[int]) -> list[Block]:
    """The blocks of these indices, without duplicates. Raises SliderError for an index that the model does not have."""
    blocks = family_of(model).blocks(diffusion_model_of(model.model))
    invalid = [index for index in block_indices if not 0 <= index < len(blocks)]
    if invalid:
        raise SliderError(f"The model has no layer {invalid[0]}; expected layers from 0 to {len(blocks) - 1}.")
    return [blocks[index] for index in dict.fromkeys(block_indices)]
