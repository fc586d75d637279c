"""Checkpoints of a run: written atomically, the last few kept, read as tensors only (weights_only)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slider_core.atomic_write import atomic_write

from .errors import TrainingError

_NAME = re.compile(r"step_(\d+)\.pt")


class Checkpoints:
    """The checkpoints in a folder, one file per step. keep_last: number of checkpoints to keep."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order."""
        matches = (_NAME.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then delete the oldest. Raises OSError if it cannot be written; none is deleted then."""
        content = io.BytesIO()
        torch.save(dict(state), content)
        atomic_write(self._file(step), content.getvalue())
        for old in self.steps[: -self.keep_last]:
            self._file(old).unlink(missing_ok=True)

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """The last checkpoint as (step, state); None if there is none. Raises TrainingError when it cannot be read."""
        for unfinished in self.folder.glob("*.part"):  # left by a killed process
            unfinished.unlink(missing_ok=True)
        if not self.steps:
            return None
        step = self.steps[-1]
        try:
            return step, torch.load(self._file(step), map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(
                f"{self._file(step)} is damaged and cannot be read ({type(error).__name__}). Delete it to resume from "
                f"{'step ' + str(self.steps[-2]) if len(self.steps) > 1 else 'the start'}."
            ) from error

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:06}.pt"
