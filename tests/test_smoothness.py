"""Smoothness metrics and the filter for edit strips, against values from Kontinuous Kontext's code."""

from __future__ import annotations

import json
import math
from itertools import accumulate

import pytest
from conftest import GOLDEN

from slider_core.errors import SliderError
from slider_core.metrics.smoothness import delta_smooth, first_order, kl_to_uniform, triangle_deficits
from training.data_preparation.strip_files import measure_strip
from training.edit_strips import MAX_KL, even_strengths, passes_category_thresholds, rejection_reason

METRICS = json.loads((GOLDEN / "metrics.json").read_text())
SEQUENCES = METRICS["sequences"]
KL_CASES = METRICS["kl_filter"]
EXACT, FLOAT32 = {"rel": 1e-12, "abs": 1e-12}, {"rel": 2e-5}


def adjacent_and_skip_one(matrix):
    last = len(matrix) - 1
    return [matrix[k][k + 1] for k in range(last)], [matrix[k][k + 2] for k in range(last - 1)]


@pytest.mark.parametrize("golden", SEQUENCES)
def test_measure_strip(golden):
    """Integers stand for images; their distances are those of the golden matrix."""
    matrix = golden["distance_matrix"]
    record = measure_strip(range(len(matrix)), lambda one, other: matrix[one][other])
    assert record["lpips_sequence"] == pytest.approx(golden["first_order"], **FLOAT32)
    assert record["lpips_sequence_triangle"] == pytest.approx(golden["triangle_second_order"], **FLOAT32)
    for key, name in (
        ("lpips_kontext_edit", "kontext_edit_last_vs_first"),
        ("lpips_edit_inversion", "edit_inversion_last_vs_second_last"),
        ("lpips_inversion_edit", "inversion_edit_second_last_vs_second"),
    ):
        assert record[key] == pytest.approx(golden[name], **FLOAT32)


@pytest.mark.parametrize("golden", SEQUENCES)
def test_triangle_deficits(golden):
    adjacent, skip_one = adjacent_and_skip_one(golden["distance_matrix"])
    deficits = triangle_deficits(adjacent, skip_one)
    assert deficits == pytest.approx(golden["triangle_second_order"], **FLOAT32)
    assert delta_smooth(adjacent, skip_one) == max(deficits)
    assert first_order(adjacent) == pytest.approx(max(golden["first_order"]) / sum(golden["first_order"]), **FLOAT32)


@pytest.mark.parametrize(
    "variant",
    [
        lambda one, two, direct: one + two - direct,
        lambda one, two, direct: (one + two - direct) / (one + two),
        lambda one, two, direct: (one + two) / direct,
    ],
)
def test_variants_of_the_deficit_differ(variant):
    for golden in SEQUENCES:
        adjacent, skip_one = adjacent_and_skip_one(golden["distance_matrix"])
        variant_deficits = [variant(one, two, direct) for one, two, direct in zip(adjacent, adjacent[1:], skip_one)]
        assert variant_deficits != pytest.approx(golden["triangle_second_order"], rel=1e-2)


def test_sequence_that_returns_to_its_start():
    assert METRICS["triangle_with_zero_direct_distance"] == ["inf"]
    assert triangle_deficits([0.2, 0.2], [0.0]) == [math.inf]
    assert triangle_deficits([0.0, 0.0], [0.0]) == [0.0]
    assert measure_strip("aba", lambda one, other: float(one != other))["lpips_sequence_triangle"] == [None]


@pytest.mark.parametrize("golden", KL_CASES)
def test_kl_filter_and_strengths(golden):
    sequence = golden["sequence"]
    assert kl_to_uniform(sequence) == pytest.approx(golden["kl_to_uniform"], **EXACT)
    assert kl_to_uniform([7 * value for value in sequence]) == pytest.approx(golden["kl_to_uniform"], **EXACT)
    assert (kl_to_uniform(sequence) <= MAX_KL) == golden["kept_at_threshold_0_15"]
    assert METRICS["kl_threshold"] == MAX_KL
    strengths = even_strengths(sequence[1:-1])
    assert strengths == pytest.approx(golden["slider_cdf_of_inner_steps"], **EXACT)
    if "mapped_slider" in golden:
        assert strengths == pytest.approx(list(golden["mapped_slider"].values()), **EXACT)


def kl_in_bits(sequence):
    return kl_to_uniform(sequence) / math.log(2)


def kl_unnormalized(sequence):
    return sum(value * math.log(value * len(sequence)) for value in sequence if value > 0)


def kl_reversed(sequence):
    return sum(math.log(sum(sequence) / (len(sequence) * (value or 1e-8))) for value in sequence) / len(sequence)


@pytest.mark.parametrize("variant", [kl_in_bits, kl_unnormalized, kl_reversed])
def test_variants_of_the_divergence_differ(variant):
    uneven = [golden for golden in KL_CASES if golden["kl_to_uniform"] > 1e-6]
    assert all(variant(g["sequence"]) != pytest.approx(g["kl_to_uniform"], rel=1e-2) for g in uneven)


def test_strengths_of_all_steps_differ():
    uneven = [golden["sequence"] for golden in KL_CASES if golden["kl_to_uniform"] > 1e-6]
    for sequence in uneven:
        sums = list(accumulate(sequence))
        assert even_strengths(sequence[1:-1]) != pytest.approx([total / sums[-1] for total in sums[:-1]], rel=1e-2)


@pytest.mark.parametrize("golden", METRICS["validity"], ids=lambda g: f"{g['category']} {g['kontext_edit']}")
def test_category_thresholds(golden):
    assert (
        passes_category_thresholds(golden["category"], golden["kontext_edit"], golden["edit_inversion"])
        == golden["valid_v2"]
    )


def test_older_thresholds_differ():
    assert any(golden["valid_v1"] != golden["valid_v2"] for golden in METRICS["validity"])


def test_rejection_reasons():
    even = {
        "lpips_sequence": [0.1] * 8,
        "category": "stylization",
        "lpips_kontext_edit": 0.3,
        "lpips_edit_inversion": 0.1,
    }
    assert rejection_reason(even, MAX_KL, True) == ""
    assert rejection_reason({**even, "lpips_sequence": [0.8] + [0.05] * 7}, MAX_KL, True) == "changes unevenly"
    assert rejection_reason({**even, "lpips_sequence": [0.0] * 8}, MAX_KL, True) == "does not change"
    weak = {**even, "lpips_kontext_edit": 0.01}
    assert "too weak" in rejection_reason(weak, MAX_KL, True)
    assert rejection_reason(weak, MAX_KL, False) == ""
    assert rejection_reason({**weak, "category": "anything_else"}, MAX_KL, True) == ""


@pytest.mark.parametrize("bad", [[], [0.1, -0.1], [0.1, math.nan], [math.inf, 0.1]])
def test_invalid_distances(bad):
    for measure in (first_order, kl_to_uniform, even_strengths):
        with pytest.raises(SliderError, match="are not distances between images"):
            measure(bad)


def test_equal_images():
    for measure in (first_order, kl_to_uniform, even_strengths):
        with pytest.raises(SliderError, match="All images are equal"):
            measure([0.0, 0.0])


def test_inconsistent_numbers_of_distances():
    with pytest.raises(SliderError, match="2 distances between neighbors and 2 between images two apart; expected 1"):
        triangle_deficits([0.1, 0.1], [0.1, 0.1])
    with pytest.raises(SliderError, match="at least three"):
        delta_smooth([0.1], [])
