"""Training samples and targets, as in the papers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from training.config import ObjectiveConfig
from training.examples import Example, ImageFile, Target
from training.frozen_model import FrozenModel, Text
from training.objectives import NEUTRAL_PROMPT, Batch, FlowMatching, PromptSuppression

CASES = [c for c in json.loads((GOLDEN / "manifest.json").read_text())["cases"] if c["kind"] == "base_forward"]
PICTURE = ImageFile(Path("a.png"))
EXAMPLE = Example(PICTURE, ("a", "b", "c"))
DRAWS = 700


def settings(kind: str, **more) -> ObjectiveConfig:
    return ObjectiveConfig(type=kind, guidance=3.5, **more)


def suppression(kind: str, **more) -> PromptSuppression:
    return PromptSuppression(settings(kind, **more), 3, None, kind == "pps")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_the_velocity_is_the_golden_one(golden_model, case):
    """Noise level, guidance, reference and sign as in the authors' code."""
    stored = load_file(GOLDEN / "forward_cases.safetensors")
    inputs = {name: stored[spec["key"]] for name, spec in case["inputs"].items()}
    model = FrozenModel(golden_model)
    references = [inputs["ref0"]] if "ref0" in inputs else []
    rows = []
    for k, (sigma, guidance) in enumerate(zip(case["sigma"], case["guidance"])):
        one = slice(k, k + 1)
        text = Text(inputs["txt"][one], inputs["y"][one])
        with torch.no_grad():
            sigmas = torch.tensor([sigma])
            rows.append(model.velocity(inputs["x"][one], sigmas, text, guidance, [r[one] for r in references]))
    tolerance = case["suggested"]
    want = stored[
        case["outputs"]["velocity"] if "velocity" in case["outputs"] else next(iter(case["outputs"].values()))
    ]
    assert torch.allclose(torch.cat(rows), want, atol=tolerance["atol"], rtol=tolerance["rtol"])


def test_pps_suppresses_every_subset_of_instructions_equally_often():
    drawn = [suppression("pps").make_sample(EXAMPLE, step, 0) for step in range(DRAWS)]
    counts = Counter(sample.suppressed for sample in drawn)
    assert len(counts) == 7
    assert () not in counts
    assert all(DRAWS / 7 * 0.6 < count < DRAWS / 7 * 1.4 for count in counts.values())
    for sample in drawn:
        assert sample.teacher == tuple(one for k, one in enumerate("abc") if k not in sample.suppressed)
        assert sample.source == sample.target_image == PICTURE


def test_spps_has_a_neutral_teacher_prompt():
    sample = suppression("spps").make_sample(EXAMPLE, 0, 0)
    assert (sample.suppressed, sample.teacher) == ((0, 1, 2), NEUTRAL_PROMPT)
    assert NEUTRAL_PROMPT == ("keep the image the same",)


def test_sigmas():
    levels = torch.tensor([suppression("pps").sample_sigma(step, place) for step in range(DRAWS) for place in range(2)])
    assert levels.min() >= 0
    assert levels.max() <= 1
    assert levels.mean().item() == pytest.approx(0.5, abs=0.03)
    assert levels.std().item() == pytest.approx(12**-0.5, abs=0.02)
    high = suppression("pps", timestep_sampling="logit_normal", logit_mean=2.0, logit_std=0.5)
    levels = torch.tensor([high.sample_sigma(step, 0) for step in range(DRAWS)])
    assert torch.logit(levels).mean().item() == pytest.approx(2, abs=0.1)
    assert torch.logit(levels).std().item() == pytest.approx(0.5, abs=0.05)


def test_a_projector_learns_one_of_the_strengths():
    targets = tuple(Target(ImageFile(Path("a.png"), k, 9), k / 6) for k in range(7))
    objective = FlowMatching(settings("flow", strength_dropout=0.2), 3, None, None)
    drawn = [objective.make_sample(EXAMPLE._replace(targets=targets), step, 0) for step in range(DRAWS)]
    assert len({sample.target_image for sample in drawn}) == 7
    assert all(Target(sample.target_image, sample.strength) in targets for sample in drawn)
    assert all(sample.source == PICTURE for sample in drawn)
    assert sum(sample.strength_dropped for sample in drawn) / DRAWS == pytest.approx(0.2, abs=0.05)
    assert {sample.teacher for sample in drawn} == {None}


def of_ones(sigma: list[float]) -> Batch:
    shape = (len(sigma), 1, 2, 2)
    clean, noise = torch.full(shape, 2.0), torch.full(shape, 10.0)
    return Batch([], torch.zeros(shape), clean, noise, torch.tensor(sigma), Text(clean, clean), None, [])


def test_noised_latent_and_target_velocity():
    batch = of_ones([0.0, 0.25, 1.0])
    assert batch.noised_latent[:, 0, 0, 0].tolist() == [2, 4, 10]
    assert FlowMatching(settings("flow"), 0, None, None).target_velocity(None, batch).unique().tolist() == [8]


def test_losses():
    one, other = torch.zeros(2, 1, 1, 2), torch.tensor([[[[0.5, 0.0]]], [[[3.0, 3.0]]]])
    assert suppression("pps").losses(one, other).tolist() == [0.125, 9]
    assert suppression("pps", loss="huber").losses(one, other).tolist() == [0.0625, 2.5]
