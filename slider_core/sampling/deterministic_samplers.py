"""Which of ComfyUI's samplers are deterministic, so that the images of a batch with equal noise stay alike."""

from __future__ import annotations

import re
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from .. import keys
from ..errors import SliderError

ONE_CALL_PER_STEP = (
    "euler",
    "ddim",
    "dpmpp_2m",
    "deis",
    "ipndm",
    "ipndm_v",
    "lms",
    "res_multistep",
    "gradient_estimation",
)
"""Samplers that call the model exactly once per step, at the sigmas of the schedule, and add no noise."""

_NOISE_ADDING = re.compile(r"ancestral|sde|seeds|ddpm|lcm|sa_solver")


def refuse_noise_adding_samplers(model: ModelPatcher) -> None:
    """Make `model` (modified in place) raise SliderError when it is sampled with a sampler that adds noise.

    Each image of a batch would get different noise, and the images would drift apart.
    """
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, keys.SAMPLER_CHECK)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, keys.SAMPLER_CHECK, _check_sampler)


def _check_sampler(executor: Any, *args: Any, **kwargs: Any) -> Any:
    name = getattr(getattr(executor.class_obj, "sampler_function", None), "__name__", "").removeprefix("sample_")
    if _NOISE_ADDING.search(name):
        raise SliderError(
            f"The sampler {name!r} adds new noise at every step, different for each image, so the edits would drift "
            f"away from the source. Choose a sampler that adds none: {', '.join(ONE_CALL_PER_STEP)}, heun, uni_pc."
        )
    return executor(*args, **kwargs)
