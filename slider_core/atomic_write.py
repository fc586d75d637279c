"""Files that are never half written."""

from __future__ import annotations

import os
from pathlib import Path


def atomic_write(file: Path, content: bytes) -> None:
    """Write a file so that it is there in full or as it was before."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
