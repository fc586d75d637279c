"""Training runs on the tiny models, with generated images."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from training.edit_strips import NUM_COLUMNS, make_strip

REPO = Path(__file__).resolve().parents[2]
ENCODER_OPTIONS = {
    "model_config": {"num_hidden_layers": 2, "intermediate_size": 256},
    "t5xxl_model_config": {"d_model": 64, "d_ff": 128, "num_heads": 1, "num_layers": 2},
}
INSTRUCTIONS = ["make the circle red", "make it night", "make the circle bigger"]
CONFIG: dict[str, Any] = {
    "method": "stlora",
    "name": "tiny",
    "output": "out",
    "cache": "cache",
    "model": {
        "extra_models_folder": "models",
        "diffusion_model": "tiny-kontext.safetensors",
        "text_encoders": ["tiny-clip-l.safetensors", "tiny-t5xxl.safetensors"],
        "text_encoder_options": ENCODER_OPTIONS,
        "max_sequence_length": 16,
        "vae": "taef1",
        "cpu": True,
    },
    "data": {"type": "combinations", "images": "images", "instructions": INSTRUCTIONS, "num_examples": 12},
    "adapter": {"rank": 4},
    "optimizer": {"learning_rate": 1e-3},
    "run": {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "resolution": 64},
    "validation": {"every_n_steps": 0, "steps": 2},
    "checkpoints": {"every_n_steps": 2},
    "logging": {"tensorboard": False},
}


def write_images(folder: Path, count: int) -> None:
    """Circles on plain backgrounds, 64x64."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for k in range(count):
        colors = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(2)]
        picture = Image.new("RGB", (64, 64), colors[0])
        left, top = rng.randrange(8, 40), rng.randrange(8, 40)
        ImageDraw.Draw(picture).ellipse((left, top, left + 18, top + 18), fill=colors[1])
        picture.save(folder / f"{k}.png")


def write_edit_strips(folder: Path, count: int) -> None:
    """Edit strips of plain images that become redder from column to column."""
    folder.mkdir()
    for k in range(count):
        row = [Image.new("RGB", (64, 64), (28 * column, 20 * k, 90)) for column in range(NUM_COLUMNS)]
        make_strip(row).save(folder / f"{k}.png")
        record = {
            "image_name": f"{k}.png",
            "edit_instruction": "make it red",
            "category": "attribute_change",
            "lpips_kontext_edit": 0.3,
            "lpips_edit_inversion": 0.1,
            "lpips_inversion_edit": 0.2,
            "lpips_sequence": [0.1] * (NUM_COLUMNS - 1),
        }
        (folder / f"{k}.json").write_text(json.dumps(record))


def write_config(folder: Path, changes: Mapping[str, Any] = {}) -> Path:
    """Write CONFIG with changes, merged by section, as a file into `folder`, which its paths are relative to."""
    content = copy.deepcopy(CONFIG)
    for section, values in changes.items():
        merge = isinstance(values, Mapping) and section != "data"
        content[section] = {**content.get(section, {}), **values} if merge else values
    file = folder / f"{content['name']}.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def started(comfyui: Path, arguments: Sequence[str | Path], processes: int = 1) -> subprocess.Popen[str]:
    """python -m training in a separate process, or in several by torchrun."""
    launch = ["-m"] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "-m"]
    return subprocess.Popen(
        [sys.executable, *launch, "training", *map(str, arguments)],
        cwd=REPO,
        env={**os.environ, "COMFYUI_PATH": str(comfyui)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
