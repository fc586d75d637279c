"""What a folder of stacks is worth: how many can be learned from, and why the others cannot."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slider_core.atomic_write import atomic_write
from slider_core.errors import SliderError
from slider_core.figures.plots import GRAY, RED, figure_image, new_figure
from slider_core.metrics.smoothness import kl_to_uniform

from ..edit_strips import THRESHOLDS, read_record, refusal
from ..examples import as_picture
from .config import Filter, PrepareConfig
from .edits import Edit

_PASS = "pass"
_NAMELESS = "no category"


def write_report(config: PrepareConfig, stacks: Path, edits: Sequence[Edit], given_up: Mapping[Edit, str]) -> str:
    """Write report.json and, when there are stacks, report.png into the output. Returns it as text.

    All stacks of the folder count, as they do in training, whichever config they are of.
    """
    files = sorted(stacks.glob("*.json"))
    records = [read_record(file) for file in files]
    outcomes = [_outcome(record, config.filter) for record in records]
    by_category: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record, outcome in zip(records, outcomes):
        by_category[record.get("category") or _NAMELESS][outcome] += 1
    failed = [{"image": str(e.image), "instruction": e.instruction, "reason": why} for e, why in given_up.items()]
    report = {
        "stacks": len(records),
        "outcomes": Counter(outcomes),
        "by category": by_category,
        "filter": config.filter.model_dump(),
        "distances": Counter(str(record.get("distance", "not told")) for record in records),
        "of other configs": len({file.stem for file in files} - {edit.name for edit in edits}),
        "not made": failed,
    }
    atomic_write(config.output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    if records:
        as_picture(_plot(records, config.filter)[0]).save(config.output / "report.png")
    return _text(report, stacks, config)


def _outcome(record: Mapping[str, Any], chosen: Filter) -> str:
    return refusal(record, chosen.most_kl, chosen.category_thresholds) or _PASS


def _plot(records: Sequence[Mapping[str, Any]], chosen: Filter) -> Any:
    unevenness = []
    ends = defaultdict(list)
    for record in records:
        with contextlib.suppress(SliderError):  # nothing changes
            unevenness.append(kl_to_uniform(record["lpips_sequence"]))
        ends[record.get("category") or _NAMELESS].append((record["lpips_kontext_edit"], record["lpips_edit_inversion"]))
    return _stacks_plot(unevenness, chosen.most_kl, ends, THRESHOLDS if chosen.category_thresholds else {})


def _stacks_plot(
    unevenness: Sequence[float],
    most: float,
    ends: Mapping[str, Sequence[tuple[float, float]]],
    thresholds: Mapping[str, tuple[float, float]],
) -> Any:
    """Histogram of the KL divergences, and for each category a scatter plot of its two distances: (1, h, w, 3).

    most: threshold of the KL divergence. ends: category -> (d(source, edit), d(edit, reconstruction)) of each strip.
    thresholds: category -> (minimum of the first, maximum of the second).
    """
    columns = min(len(ends) + 1, 4)
    rows = -(-(len(ends) + 1) // columns)
    figure = new_figure(4 * columns, 4 * rows)
    first, *others = figure.subplots(rows, columns, squeeze=False).flat
    first.hist(unevenness, bins=30, color=GRAY)
    first.axvline(most, color=RED, label="threshold")
    first.set(xlabel="KL from even changes, nats", ylabel="stacks", title="evenness")
    first.legend()
    for axes, (category, points) in zip(others, sorted(ends.items())):
        axes.scatter(*zip(*points), color=GRAY, s=12)
        if category in thresholds:
            axes.axvline(thresholds[category][0], color=RED)
            axes.axhline(thresholds[category][1], color=RED)
        axes.set(xlabel="edit from source", ylabel="reconstruction from edit", title=category)
    for axes in others[len(ends) :]:
        axes.set_axis_off()
    return figure_image(figure)


def _text(report: Mapping[str, Any], stacks: Path, config: PrepareConfig) -> str:
    total, outcomes = report["stacks"], report["outcomes"]
    lines = [f"{outcomes[_PASS]} of {total} stacks in {stacks} pass the filter."]
    lines += [f"  {count} x {why}" for why, count in outcomes.most_common() if why != _PASS]
    for category, found in sorted(report["by category"].items()):
        known = "" if category in THRESHOLDS else " (has no thresholds)"
        lines.append(f"  {category}{known}: {found[_PASS]} of {found.total()}")
    if others := report["of other configs"]:
        lines.append(f"{others} of them are of edits that this config does not name; training uses them too.")
    if config.filter.category_thresholds and any(kind != "lpips" for kind in report["distances"]):
        lines.append("The category thresholds are made for LPIPS, but there are distances of another kind.")
    if failed := report["not made"]:
        lines.append(f"{len(failed)} could not be made:")
        lines += [f"  {one['image']}, {one['instruction']!r}: {one['reason']}" for one in failed]
    return "\n".join(lines)
