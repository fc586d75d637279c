"""Files that nodes read: adapters and projectors of the loras folder, trajectories of the output and input folders."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

FOLDER = "loras"
TRAJECTORY = ".trajectory.safetensors"

Fingerprint = tuple[float, int]
"""Changes when a file does."""


def names() -> list[str]:
    """The adapters and projectors that people can choose."""
    return folder_paths.get_filename_list(FOLDER)


def path_of(name: str) -> str:
    return folder_paths.get_full_path_or_raise(FOLDER, name)


def fingerprint(name: str) -> Fingerprint:
    return _fingerprint(path_of(name))


def trajectory_names() -> list[str]:
    """The trajectories that people can choose, as 'folder/file [output]'."""
    folders = {"output": folder_paths.get_output_directory(), "input": folder_paths.get_input_directory()}
    return [
        f"{file.relative_to(folder).as_posix()} [{kind}]"
        for kind, folder in folders.items()
        for file in sorted(Path(folder).rglob(f"*{TRAJECTORY}"))
    ]


def trajectory_path(name: str) -> str:
    return folder_paths.get_annotated_filepath(name)


def trajectory_fingerprint(name: str) -> Fingerprint:
    return _fingerprint(trajectory_path(name))


def _fingerprint(path: str) -> Fingerprint:
    stat = os.stat(path)
    return stat.st_mtime, stat.st_size
