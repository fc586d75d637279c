"""Files that nodes read: adapters and projectors in the loras folder, trajectories in the output and input folders."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

FOLDER = "loras"
TRAJECTORY = ".trajectory.safetensors"

FileStamp = tuple[float, int]
"""Modification time and size of a file, which change when the file does."""


def lora_names() -> list[str]:
    """Names of the adapter and projector files that can be chosen."""
    return folder_paths.get_filename_list(FOLDER)


def lora_path(name: str) -> str:
    return folder_paths.get_full_path_or_raise(FOLDER, name)


def lora_stamp(name: str) -> FileStamp:
    return _stamp(lora_path(name))


def trajectory_names() -> list[str]:
    """The trajectories that can be chosen, as 'folder/file [output]'."""
    folders = {"output": folder_paths.get_output_directory(), "input": folder_paths.get_input_directory()}
    return [
        f"{file.relative_to(folder).as_posix()} [{kind}]"
        for kind, folder in folders.items()
        for file in sorted(Path(folder).rglob(f"*{TRAJECTORY}"))
    ]


def trajectory_path(name: str) -> str:
    return folder_paths.get_annotated_filepath(name)


def trajectory_stamp(name: str) -> FileStamp:
    return _stamp(trajectory_path(name))


def _stamp(path: str) -> FileStamp:
    stat = os.stat(path)
    return stat.st_mtime, stat.st_size
