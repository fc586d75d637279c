"""Configs: every example is valid, and everything that is wrong in one is told at once."""

from __future__ import annotations

import comfy.model_management
import pytest
import yaml
from conftest import REPO
from support.training_run import CONFIG, write_config

from training.__main__ import main
from training.config import PAPERS, read_config
from training.data_preparation.config import read_prepare_config
from training.errors import TrainingError

EXAMPLES = sorted((REPO / "training" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_are_valid(file):
    config = read_prepare_config(file) if file.name == "prepare.yaml" else read_config(file)
    assert config.model_dump()


@pytest.mark.parametrize("method", PAPERS)
def test_examples_say_what_the_papers_do(method):
    config = read_config(REPO / "training" / "configs" / f"{method}.yaml").model_dump()
    for section, values in PAPERS[method].items():
        assert values.items() <= config[section].items()


def test_what_is_commented_out_is_the_default(tmp_path):
    """stlora.yaml explains the settings; with its commented values written out, the config is the same."""
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
    assert plain.optimiser.betas == (0.9, 0.999)


def test_what_is_left_out_is_from_the_papers(tmp_path):
    for method, sections in PAPERS.items():
        data = {"kind": "stacks", "path": "x"} if method == "projector" else CONFIG["data"]
        content = {"method": method, "name": "a", "output": "b", "base": CONFIG["base"], "data": data}
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
        "base:\n"
        "  model: a\n"
        "  text_encoders: []\n"
        "  weight_dtype: fp4\n"
        "data:\n"
        "  kind: combinations\n"
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
        (4, "base.vae", "required"),
        (6, "base.text_encoders", "at least 1"),
        (7, "base.weight_dtype", "'default', 'float8_e4m3fn'"),
        (12, "data.exmaples", "there are examples, held_out"),
        (14, "run.steps", "greater than or equal to 1, found -1"),
        (15, "run.resolution", "multiple of 16"),
    ):
        assert any(f"line {line}: {place}" in text and said in text for text in lines), (place, str(told.value))
    assert len(lines) == 6


def test_methods_objectives_and_data_must_fit(tmp_path):
    with pytest.raises(TrainingError, match=r"for projector it is 'flow'; data\.kind is 'combinations'"):
        read_config(write_config(tmp_path, {"method": "projector", "objective": {"kind": "pps", "guidance": 1.0}}))


def test_wrong_files_are_told_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", False)  # given back afterwards
    config = write_config(tmp_path, {"base": {"model": "gone.safetensors", "models": None}})
    assert main(["train", str(config)]) == 1
    assert "'gone.safetensors' is not in ComfyUI's folder 'diffusion_models'" in capsys.readouterr().err
    config = write_config(tmp_path, {"base": {"comfyui": str(tmp_path)}})
    assert main(["train", str(config)]) == 1
    assert "is no ComfyUI: expected main.py beside a folder comfy" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "text.yaml").write_text("just words")
    with pytest.raises(TrainingError, match="expected keys such as 'method: "):
        read_config(tmp_path / "text.yaml")


def test_prodigy_finds_its_own_learning_rate(tmp_path):
    content = {name: CONFIG[name] for name in ("method", "name", "output", "base", "data")}
    for given, expected in (({"kind": "prodigy"}, 1), ({"kind": "prodigy", "learning_rate": 0.5}, 0.5), ({}, 5e-5)):
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({**content, "optimiser": given}))
        assert read_config(tmp_path / "a.yaml").optimiser.learning_rate == expected


def test_files_beside_the_config_are_found(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    base = {"model": "mine.safetensors", "text_encoders": ["mine.safetensors", "other.safetensors"]}
    found = read_config(write_config(tmp_path, {"base": base})).base
    assert found.model == str(tmp_path / "mine.safetensors")
    assert found.text_encoders == [str(tmp_path / "mine.safetensors"), "other.safetensors"]
