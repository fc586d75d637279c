"""Report on the edit strips in a folder: how many pass the training filters, and why the others do not."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from slider_core.atomic_write import atomic_write
from slider_core.errors import SliderError
from slider_core.figures.plots import GRAY, RED, figure_image, new_figure
from slider_core.metrics.smoothness import kl_to_uniform

from ..edit_strips import CATEGORY_THRESHOLDS, read_record, rejection_reason
from ..examples import tensor_to_pil
from .config import FilterConfig, PrepareConfig
from .edits import Edit

_PASS = "pass"
_NO_CATEGORY = "no category"


def write_report(config: PrepareConfig, edits: Sequence[Edit], abandoned: Mapping[Edit, str]) -> str:
    """Write report.json and, if there are strips, report.png into the output. Returns the report as text.

    It covers all strips in the folder, including those of other configs, because training uses them all.
    """
    files = sorted(config.strips_folder.glob("*.json"))
    records = [read_record(file) for file in files]
    outcomes = [_outcome(record, config.filter) for record in records]
    by_category: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record, outcome in zip(records, outcomes):
        by_category[record.get("category") or _NO_CATEGORY][outcome] += 1
    failed = [
        {"image": str(edit.image), "instruction": edit.instruction, "reason": reason}
        for edit, reason in abandoned.items()
    ]
    report = {
        "num_strips": len(records),
        "outcomes": Counter(outcomes),
        "by_category": by_category,
        "filter": config.filter.model_dump(),
        "distances": Counter(str(record.get("distance", "unknown")) for record in records),
        "num_of_other_configs": len({file.stem for file in files} - {edit.name for edit in edits}),
        "failed": failed,
    }
    atomic_write(config.output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    if records:
        tensor_to_pil(_plot(records, config.filter)[0]).save(config.output / "report.png")
    return _text(report, config)


def _outcome(record: Mapping[str, Any], filters: FilterConfig) -> str:
    return rejection_reason(record, filters.max_kl, filters.category_thresholds) or _PASS


def _plot(records: Sequence[Mapping[str, Any]], filters: FilterConfig) -> Any:
    unevenness = []
    ends = defaultdict(list)
    for record in records:
        with contextlib.suppress(SliderError):  # nothing changes
            unevenness.append(kl_to_uniform(record["lpips_sequence"]))
        category = record.get("category") or _NO_CATEGORY
        ends[category].append((record["lpips_kontext_edit"], record["lpips_edit_inversion"]))
    return _strips_plot(unevenness, filters.max_kl, ends, CATEGORY_THRESHOLDS if filters.category_thresholds else {})


def _strips_plot(
    unevenness: Sequence[float],
    max_kl: float,
    ends: Mapping[str, Sequence[tuple[float, float]]],
    thresholds: Mapping[str, tuple[float, float]],
) -> Any:
    """Histogram of the KL divergences, and for each category a scatter plot of its two distances: (1, h, w, 3).

    max_kl: threshold of the KL divergence. ends: category -> (d(source, edit), d(edit, reconstruction)) of each strip.
    thresholds: category -> (minimum of the first, maximum of the second).
    """
    columns = min(len(ends) + 1, 4)
    rows = -(-(len(ends) + 1) // columns)
    figure = new_figure(4 * columns, 4 * rows)
    first, *others = figure.subplots(rows, columns, squeeze=False).flat
    first.hist(unevenness, bins=30, color=GRAY)
    first.axvline(max_kl, color=RED, label="threshold")
    first.set(xlabel="KL to even changes, nats", ylabel="edit strips", title="evenness")
    first.legend()
    for axes, (category, points) in zip(others, sorted(ends.items())):
        axes.scatter(*zip(*points), color=GRAY, s=12)
        if category in thresholds:
            axes.axvline(thresholds[category][0], color=RED)
            axes.axhline(thresholds[category][1], color=RED)
        axes.set(xlabel="d(source, edit)", ylabel="d(edit, reconstruction)", title=category)
    for axes in others[len(ends) :]:
        axes.set_axis_off()
    return figure_image(figure)


def _text(report: Mapping[str, Any], config: PrepareConfig) -> str:
    total, outcomes = report["num_strips"], report["outcomes"]
    lines = [f"{outcomes[_PASS]} of {total} edit strips in {config.strips_folder} pass the filters."]
    lines += [f"  {count} x {reason}" for reason, count in outcomes.most_common() if reason != _PASS]
    for category, counts in sorted(report["by_category"].items()):
        note = "" if category in CATEGORY_THRESHOLDS else " (no thresholds)"
        lines.append(f"  {category}{note}: {counts[_PASS]} of {counts.total()}")
    if others := report["num_of_other_configs"]:
        lines.append(f"{others} of them belong to edits that are not in this config; training uses them too.")
    if config.filter.category_thresholds and any(distance != "lpips" for distance in report["distances"]):
        lines.append("The category thresholds are for LPIPS, but some strips have other distances.")
    if failed := report["failed"]:
        lines.append(f"{len(failed)} edits failed:")
        lines += [f"  {edit['image']}, {edit['instruction']!r}: {edit['reason']}" for edit in failed]
    return "\n".join(lines)
