"""Files of ComfyUI's loras folder, where adapters and projectors lie."""

from __future__ import annotations

import os

import folder_paths

FOLDER = "loras"


def names() -> list[str]:
    """The files that people can choose."""
    return folder_paths.get_filename_list(FOLDER)


def path_of(name: str) -> str:
    return folder_paths.get_full_path_or_raise(FOLDER, name)


def fingerprint(name: str) -> tuple[float, int]:
    """Changes when the file does."""
    stat = os.stat(path_of(name))
    return stat.st_mtime, stat.st_size
