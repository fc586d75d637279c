"""Configs: every example is valid, and all errors in a config are reported at once."""

from __future__ import annotations

import re

import comfy.model_management
import pytest
import yaml
from conftest import REPO
from support.training_run import CONFIG, write_config

from training.__main__ import main
from training.config import PAPER_DEFAULTS, TrainingConfig, read_config
from training.data_preparation.config import PrepareConfig, read_prepare_config
from training.errors import TrainingError
from training.run import pack_version
from training.strict_config import RENAMED_KEYS, _sections_in

EXAMPLES = sorted((REPO / "training" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_are_valid(file):
    config = read_prepare_config(file) if file.name == "prepare.yaml" else read_config(file)
    assert config.model_dump()


@pytest.mark.parametrize("method", PAPER_DEFAULTS)
def test_examples_have_the_settings_of_the_papers(method):
    config = read_config(REPO / "training" / "configs" / f"{method}.yaml").model_dump()
    for section, values in PAPER_DEFAULTS[method].items():
        assert values.items() <= config[section].items()


def test_commented_settings_are_the_defaults(tmp_path):
    """stlora.yaml documents the defaults as comments: with all of them uncommented, the config is the same."""
    text = (REPO / "training" / "configs" / "stlora.yaml").read_text()
    start = text.index("adapter:")
    written_out = []
    for line in text[start:].splitlines():
        setting = line.strip().removeprefix("# ")
        is_setting = line.strip().startswith("# ") and ":" in setting.split("#")[0] and "project-name" not in setting
        written_out.append(f"  {setting}" if is_setting else line)
    (tmp_path / "written.yaml").write_text(text[:start] + "\n".join(written_out))
    (tmp_path / "plain.yaml").write_text(text)
    written, plain = (read_config(tmp_path / f"{name}.yaml") for name in ("written", "plain"))
    assert written == plain
    assert "# betas" in text
    assert plain.optimizer.betas == (0.9, 0.999)


def test_missing_settings_are_those_of_the_papers(tmp_path):
    for method, sections in PAPER_DEFAULTS.items():
        data = {"type": "edit_strips", "path": "x"} if method == "projector" else CONFIG["data"]
        content = {"method": method, "name": "a", "output": "b", "model": CONFIG["model"], "data": data}
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
        config = read_config(tmp_path / "a.yaml").model_dump()
        for section, values in sections.items():
            assert values.items() <= config[section].items()
    assert config["objective"]["guidance"] == 1
    assert config["output"] == tmp_path / "b"


def test_all_errors_at_once_with_their_lines(tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "method: stlora\n"
        "name: bad\n"
        "output: out\n"
        "model:\n"
        "  diffusion_model: a\n"
        "  text_encoders: []\n"
        "  weight_dtype: fp4\n"
        "data:\n"
        "  type: combinations\n"
        "  images: x\n"
        "  instructions: [a]\n"
        "  exmaples: 3\n"
        "run:\n"
        "  steps: -1\n"
        "  resolution: 100\n"
    )
    with pytest.raises(TrainingError) as told:
        read_config(tmp_path / "bad.yaml")
    lines = str(told.value).splitlines()
    for line, place, said in (
        (4, "model.vae", "required"),
        (6, "model.text_encoders", "at least 1"),
        (7, "model.weight_dtype", "'default', 'float8_e4m3fn'"),
        (12, "data.exmaples", "expected one of images, instructions, max_instructions_per_prompt"),
        (14, "run.steps", "greater than or equal to 1, found -1"),
        (15, "run.resolution", "multiple of 16"),
    ):
        assert any(f"line {line}: {place}" in text and said in text for text in lines), (place, str(told.value))
    assert len(lines) == 6


def test_methods_objectives_and_data_must_fit(tmp_path):
    with pytest.raises(TrainingError, match=r"method projector needs 'flow'; data\.type is 'combinations'"):
        read_config(write_config(tmp_path, {"method": "projector", "objective": {"type": "pps", "guidance": 1.0}}))


def test_wrong_files_are_reported_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", False)  # given back afterwards
    config = write_config(tmp_path, {"model": {"diffusion_model": "gone.safetensors", "extra_models_folder": None}})
    assert main(["train", str(config)]) == 1
    assert "'gone.safetensors' is not in ComfyUI's folder 'diffusion_models'" in capsys.readouterr().err
    config = write_config(tmp_path, {"model": {"comfyui": str(tmp_path)}})
    assert main(["train", str(config)]) == 1
    assert "is not a ComfyUI folder: expected main.py and a folder comfy" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "text.yaml").write_text("just words")
    with pytest.raises(TrainingError, match="expected keys such as 'method: "):
        read_config(tmp_path / "text.yaml")


def test_prodigy_finds_its_own_learning_rate(tmp_path):
    content = {name: CONFIG[name] for name in ("method", "name", "output", "model", "data")}
    for given, expected in (({"type": "prodigy"}, 1), ({"type": "prodigy", "learning_rate": 0.5}, 0.5), ({}, 5e-5)):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({**content, "optimizer": given}))
        assert read_config(tmp_path / "a.yaml").optimizer.learning_rate == expected


def test_files_next_to_the_config_are_found(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    model = {"diffusion_model": "mine.safetensors", "text_encoders": ["mine.safetensors", "other.safetensors"]}
    found = read_config(write_config(tmp_path, {"model": model})).model
    assert found.diffusion_model == str(tmp_path / "mine.safetensors")
    assert found.text_encoders == [str(tmp_path / "mine.safetensors"), "other.safetensors"]


FORMER_CONFIG = """\
method: stlora
base:
  model: a
  text_rows: 256
data:
  kind: stacks
  held_out: 2
optimiser:
  schedule: cosine
  ema: 0.9
run:
  checkpointing: false
  batch: 4
watching:
  tensorboard: false
"""


def test_former_keys_are_reported_with_their_current_names(tmp_path):
    (tmp_path / "old.yaml").write_text(FORMER_CONFIG)
    with pytest.raises(TrainingError) as error:
        read_config(tmp_path / "old.yaml")
    assert str(error.value).splitlines() == [
        f"old.yaml, line {line}: {message}"
        for line, message in (
            (2, "'base' is now 'model'"),
            (3, "'base.model' is now 'model.diffusion_model'"),
            (4, "'base.text_rows' is now 'model.max_sequence_length'"),
            (6, "'data.kind' is now 'data.type'"),
            (6, "the value 'stacks' of 'data.type' is now 'edit_strips'"),
            (7, "'data.held_out' is now 'data.num_validation'"),
            (8, "'optimiser' is now 'optimizer'"),
            (9, "'optimiser.schedule' is now 'optimizer.lr_scheduler'"),
            (10, "'optimiser.ema' is now 'optimizer.ema_decay'"),
            (12, "'run.checkpointing' is now 'run.gradient_checkpointing'"),
            (13, "'run.batch' is now 'run.batch_size'"),
            (14, "'watching' is now 'logging'"),
        )
    ]


def test_former_keys_are_not_keys_now_and_their_current_names_are(tmp_path):
    def paths(section, prefix=""):
        for name, field in section.model_fields.items():
            yield prefix + name
            for inner in _sections_in(field.annotation):
                yield from paths(inner, f"{prefix}{name}.")

    current = {*paths(TrainingConfig), *paths(PrepareConfig)}
    for former, name in RENAMED_KEYS.items():
        assert former not in current
        assert ".".join([*former.split(".")[:-1], name]) in current


def test_every_version_is_the_same():
    page = (REPO / "web" / "edit_sliders.js").read_text(encoding="utf-8")
    [version] = re.findall(r"const VERSION = '(.+)'", page)
    assert version == pack_version()
    assert f'version = "{version}"' in (REPO / "pyproject.toml").read_text(encoding="utf-8")
