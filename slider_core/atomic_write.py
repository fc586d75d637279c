"""Atomic file writes."""

from __future__ import annotations

import os
from pathlib import Path


def atomic_write(file: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `file`, then rename it: `file` is never left partially written."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
