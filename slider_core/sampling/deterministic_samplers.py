"""Which of ComfyUI's samplers suit pictures that have to stay alike."""

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
"""Call the model exactly once at every noise level of the schedule, and add no noise."""

_ADDS_NOISE = re.compile(r"ancestral|sde|seeds|ddpm|lcm|sa_solver")


def refuse_noise_adding_samplers(model: ModelPatcher) -> None:
    """Make `model`, a clone of one's own, raise SliderError under a sampler that adds noise at its steps.

    Each picture of a batch would get noise of its own, and they would drift apart.
    """
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, keys.SAMPLER_CHECK)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, keys.SAMPLER_CHECK, _check)


def _check(executor: Any, *args: Any, **kwargs: Any) -> Any:
    name = getattr(getattr(executor.class_obj, "sampler_function", None), "__name__", "").removeprefix("sample_")
    if _ADDS_NOISE.search(name):
        raise SliderError(
            f"The sampler {name!r} adds new noise at every step, other noise to each picture, so the edits would drift "
            f"away from the source. Expected a sampler that adds none: {', '.join(ONE_CALL_PER_STEP)}, heun, uni_pc."
        )
    return executor(*args, **kwargs)
