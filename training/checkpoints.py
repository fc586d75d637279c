"""States to go on from: written whole or not at all, the newest few kept, read without running anything in them."""

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
    """The states in a folder, by step."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a state."""
        found = (_NAME.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a state, then forget the oldest. Raises OSError when the disk is full; nothing is lost then."""
        content = io.BytesIO()
        torch.save(dict(state), content)
        atomic_write(self._file(step), content.getvalue())
        for old in self.steps[: -self.keep]:
            self._file(old).unlink(missing_ok=True)

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """The last state. Raises TrainingError when it cannot be read."""
        for unfinished in self.folder.glob("*.part"):  # of a process that was killed
            unfinished.unlink(missing_ok=True)
        if not self.steps:
            return None
        step = self.steps[-1]
        try:
            return step, torch.load(self._file(step), map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainingError(
                f"{self._file(step)} cannot be read ({type(error).__name__}); it is damaged. Delete it to go on from "
                f"{'step ' + str(self.steps[-2]) if len(self.steps) > 1 else 'the start'}."
            ) from error

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:06}.pt"
