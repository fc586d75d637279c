"""Vital layers: where edits of a batch take their keys and values from the source (Stable Flow, section 3).

Blocks are counted as in the paper: double blocks first, then single blocks; 0 to 56 in FLUX.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .. import keys
from ..conditioning.masks import mask_coverage, validate_single_mask
from ..conditioning.schedule import check_schedule_range
from ..errors import SliderError
from ..families import Block, family_of
from ..families.network import diffusion_model_of
from ..int_ranges import parse_int_ranges
from ..patching.forward_patches import Forward, ForwardContext, ForwardWrapper, ModelPatch, Phase, add_patch
from ..sampling.deterministic_samplers import refuse_noise_adding_samplers


class KVSlots:
    """Where some layers of a model compute K and V of the image's own tokens."""

    def __init__(self, model: ModelPatcher, layers: Sequence[int]):
        self.family, self.blocks = family_of(model), select_blocks(model, layers)
        self.width = self.family.hidden_size(diffusion_model_of(model.model))

    def shape(self, latent: Sequence[int]) -> tuple[int, int, int]:
        """(layers, tokens, 2 * width) for a latent's shape."""
        return len(self.blocks), self.family.image_tokens(latent), 2 * self.width

    def changed(
        self, context: ForwardContext, change: Callable[[int, torch.Tensor], None]
    ) -> Mapping[str, ForwardWrapper]:
        """Lets `change` write into them: (k-th of the layers, its K and V of shape (batch, tokens, 2 * width))."""
        tokens, columns = self.family.image_tokens(context.latent_shape), slice(self.width, 3 * self.width)
        changes = {}
        for layer, block in enumerate(self.blocks):
            first = context.num_text_tokens if block.joint_sequence else 0
            changes[block.qkv] = _changed(layer, (slice(first, first + tokens), columns), change)
        return changes


def _changed(layer: int, place: tuple[slice, slice], change: Callable[[int, torch.Tensor], None]) -> ForwardWrapper:
    rows, columns = place

    def wrap(forward: Forward) -> Forward:
        def with_change(x: torch.Tensor) -> torch.Tensor:
            y = forward(x)
            change(layer, y[:, rows, columns])
            return y

        return with_change

    return wrap


class InjectionWeight:
    """How much of K and V is injected: 0 = own, 1 = the source's; where, and in which part of the schedule.

    Raises SliderError for a part that ends before it starts, and for a mask that is none or several.
    """

    def __init__(self, strength: float, start: float, end: float, mask: torch.Tensor | None):
        check_schedule_range(start, end)
        self.strength, self.part = strength, (start, end)
        self.mask = None if mask is None else validate_single_mask(mask)

    def acts(self, context: ForwardContext) -> bool:
        """Whether anything is injected in this model call."""
        return self.strength != 0 and context.within(*self.part)

    def of_tokens(self, places: KVSlots, context: ForwardContext) -> torch.Tensor:
        """One for all tokens, (), or (tokens, 1)."""
        strength = torch.tensor(self.strength)
        if self.mask is not None:
            _check_whole(context)
            strength = strength * mask_coverage(
                self.mask, context.latent_shape, places.family.image_grid(context.latent_shape)
            )
        return strength.to(context.device)

    def applied(self, model: ModelPatcher) -> ModelPatcher:
        """The model, a clone of one's own, made to refuse samplers that add noise, and masks on areas."""
        refuse_noise_adding_samplers(model)
        if self.mask is not None:
            model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, keys.SAMPLED_SHAPE_WRAPPER)
            model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, keys.SAMPLED_SHAPE_WRAPPER, _note_sampled)
        return model


def _note_sampled(
    executor: Any,
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any],
    callback: Any,
    noise: torch.Tensor,
    *args: Any,
    **more: Any,
) -> torch.Tensor:
    options = extra_args["model_options"]
    noted = {**options["transformer_options"], keys.SAMPLED_SHAPE: tuple(noise.shape)}
    extra_args = {**extra_args, "model_options": {**options, "transformer_options": noted}}
    return executor(guider, sigmas, extra_args, callback, noise, *args, **more)


def _check_whole(context: ForwardContext) -> None:
    sampled, covered = (
        context.inputs.transformer_options.get(keys.SAMPLED_SHAPE, context.latent_shape)[-2:],
        context.latent_shape[-2:],
    )
    if tuple(sampled) != tuple(covered):
        raise SliderError(
            f"A conditioning covers {covered[1]} x {covered[0]} of a latent of {sampled[1]} x {sampled[0]}, where the "
            "mask of an injection would lie elsewhere; expected all of it. Take the area off the conditioning, or the "
            "mask off the injection."
        )


class KeyValueInjection(ModelPatch):
    """Operation: in some layers, K and V of the image tokens of every image become those of the reference image.

    Text tokens, reference latents and all queries keep their own.
    chained: the first image has no reference, every other one the image before it.
    """

    phase = Phase.REPLACE

    def __init__(self, places: KVSlots, reference: int, share: InjectionWeight, chained: bool):
        self.places, self.reference, self.share, self.chained = places, reference, share, chained

    @property
    def rank(self) -> tuple[Any, ...]:
        return ("within the batch", self.chained, self.reference)

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        if context.num_images < 2:
            raise SliderError(
                "The batch has one image; expected source and edits in one batch, from Stack Prompts and Same Noise. "
                "For a source outside of the batch use Inject Remembered Source."
            )
        if not self.reference < context.num_images:
            raise SliderError(
                f"The reference is image {self.reference} of the batch (counted from 0), but the batch has "
                f"{context.num_images} images. Choose another reference."
            )
        if not self.share.acts(context):
            return {}
        images, reference, chained = context.num_images, self.reference, self.chained
        share = self.share.of_tokens(self.places, context)

        def inject(_: int, part: torch.Tensor) -> None:
            by_image = part.unflatten(0, (-1, images))
            if chained:
                by_image[:, 1:].lerp_(by_image[:, :-1].clone(), share.to(part))
            else:
                by_image.lerp_(by_image[:, reference : reference + 1].clone(), share.to(part))

        return self.places.changed(context, inject)


def inject_key_values(
    model: ModelPatcher,
    layers: Sequence[int],
    reference: int = 0,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    chained: bool = False,
    mask: torch.Tensor | None = None,
) -> ModelPatcher:
    """A clone of `model` that renders a batch with the reference image's K and V in `layers`.

    start, end: the part of the schedule, 0 to 1, where it does so. chained: every image takes them from the one before
    it, whatever the reference (a chain of edits, section 4.4). mask: (height, width) or (1, height, width), what the
    strength is multiplied by. Raises SliderError for a layer that the model does not have, a part that ends before it
    starts and a mask that is none or several; when sampling, for a batch of one, samplers that add noise, and a mask
    with a conditioning that has an area.
    """
    share = InjectionWeight(strength, start, end, mask)
    places = KVSlots(model, layers)
    return share.applied(add_patch(model, KeyValueInjection(places, reference, share, chained)))


class Bypass(ModelPatch):
    """Operation: some blocks pass their inputs on unchanged."""

    phase = Phase.REPLACE

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = blocks

    def forward_wrappers(self, context: ForwardContext) -> Mapping[str, ForwardWrapper]:
        return {block.path: _passing(block) for block in self.blocks}


def bypass(model: ModelPatcher, layers: Sequence[int]) -> ModelPatcher:
    """A clone of `model` without `layers`, to find out how vital they are."""
    return add_patch(model, Bypass(select_blocks(model, layers)))


LAYER_SETS = ("vital layers", "vital layers without layer 2", "all layers", "all but the vital layers")


def layer_set(model: ModelPatcher, name: str) -> list[int]:
    """The layers of one of LAYER_SETS for the model's family."""
    vital, every = list(family_of(model).vital_layers), list(range(block_count(model)))
    sets = (
        vital,
        [layer for layer in vital if layer != 2],
        every,
        [layer for layer in every if layer not in vital],
    )
    return sets[LAYER_SETS.index(name)]


def block_count(model: ModelPatcher) -> int:
    """Number of the model's layers."""
    return len(family_of(model).blocks(diffusion_model_of(model.model)))


def parse_block_indices(text: str) -> list[int]:
    """Layers such as '0, 1, 17-18'. Raises SliderError naming what is neither a number nor a range."""
    layers = parse_int_ranges(text, "layer", "0, 1, 17-18")
    if not layers:
        raise SliderError("No layer is listed; expected numbers and ranges such as '0, 1, 17-18'.")
    return layers


def select_blocks(model: ModelPatcher, layers: Sequence[int]) -> list[Block]:
    """The blocks of some layers, each once. Raises SliderError for a layer that the model does not have."""
    blocks = family_of(model).blocks(diffusion_model_of(model.model))
    absent = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if absent:
        raise SliderError(f"The model has no layer {absent[0]}; expected layers from 0 to {len(blocks) - 1}.")
    return [blocks[layer] for layer in dict.fromkeys(layers)]


def _passing(block: Block) -> ForwardWrapper:
    return lambda forward: block.identity_forward
