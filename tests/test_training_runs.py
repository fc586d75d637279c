"""Training runs: cache, checkpoints, resuming, several processes, adapter files for the nodes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import time

import comfy.model_management
import folder_paths
import pytest
import torch
from accelerate import Accelerator
from conftest import COMFYUI, GOLDEN, REPO
from PIL import Image
from safetensors.torch import load_file
from support.graphs import Graph
from support.tiny_models import write_tiny_models
from support.training_run import INSTRUCTIONS, started, write_config, write_edit_strips, write_images

from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.strength_projector import read_projector
from training import checkpoints, sample_cache
from training.__main__ import main
from training.callbacks import ProgressLogger, read_log
from training.config import read_config
from training.errors import TrainingError
from training.export import export_adapter, read_metadata, write_adapter
from training.frozen_model import FrozenModel
from training.run import Run
from training.trainable import TrainableLora, TrainableProjector


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, images, and a cache that all runs share."""
    folder = tmp_path_factory.mktemp("training")
    write_tiny_models(folder / "models")
    for part in (folder / "models").iterdir():
        if part.is_dir():
            folder_paths.add_model_folder_path(part.name, str(part))
    write_images(folder / "images", 6)
    return folder


@pytest.fixture(autouse=True)
def in_training(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", True)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def prepare_run(place, accelerator, **changes) -> Run:
    return Run.prepare(read_config(write_config(place, changes)), accelerator, lambda *_: None)


def train(run: Run, accelerator) -> None:
    run.train([ProgressLogger(run.config, accelerator, run.render_validation)])


def trained(place, accelerator, **changes) -> Run:
    run = prepare_run(place, accelerator, **changes)
    run.config.output.mkdir(exist_ok=True)
    train(run, accelerator)
    return run


def result(place, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / f"out_{name}" / f"{name}.safetensors")


def named(name: str, **changes):
    return {"name": name, "output": f"out_{name}", **changes}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def apart(one, other) -> float:
    """The largest relative difference of a tensor; single values may differ more, as Adam amplifies rounding errors."""
    assert one.keys() == other.keys()
    return torch.stack([(one[key] - other[key]).norm() / other[key].norm() for key in one]).max().item()


def test_inputs_are_encoded_once(place, accelerator, monkeypatch):
    prepare_run(place, accelerator)
    monkeypatch.setattr(sample_cache, "load_vae", None)
    monkeypatch.setattr(sample_cache, "load_text_encoders", None)
    prepare_run(place, accelerator)
    with pytest.raises(TypeError):
        prepare_run(place, accelerator, run={"resolution": 48})


def test_changed_inputs_are_noticed(place, accelerator, caplog, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    data = {
        "type": "combinations",
        "images": str(tmp_path / "images"),
        "instructions": INSTRUCTIONS,
        "num_examples": 12,
    }
    one = prepare_run(place, accelerator, data=data, cache=str(tmp_path / "cache"))
    source = next(example.source for example in one.examples.training if example.source.file.name == "0.png")
    before = one.cache.latent(source)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "0.png")
    with caplog.at_level(logging.WARNING):
        other = prepare_run(place, accelerator, data=data, cache=str(tmp_path / "cache"))
    assert "1 images changed" in caplog.text
    assert not torch.equal(other.cache.latent(source), before)
    known = len(list((tmp_path / "cache" / "texts").iterdir()))
    prepare_run(place, accelerator, data=data, cache=str(tmp_path / "cache"), model={"max_sequence_length": 20})
    assert len(list((tmp_path / "cache" / "texts").iterdir())) == 2 * known


def test_unreadable_images_are_skipped(place, accelerator, caplog, tmp_path):
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    data = {
        "type": "combinations",
        "images": str(tmp_path / "images"),
        "instructions": INSTRUCTIONS,
        "num_examples": 12,
    }
    with caplog.at_level(logging.WARNING):
        run = prepare_run(place, accelerator, data=data)
    assert "1.png is skipped" in caplog.text
    assert {example.source.file.name for example in run.examples.training} == {"0.png", "2.png"}
    (tmp_path / "images" / "0.png").write_bytes(b"")
    (tmp_path / "images" / "2.png").write_bytes(b"")
    with pytest.raises(TrainingError, match="None of the images can be read"):
        prepare_run(place, accelerator, data=data)


def test_instructions_without_text_are_reported(place, accelerator):
    data = {"type": "combinations", "images": "images", "instructions": ["make it red", "()"], "num_examples": 6}
    with pytest.raises(TrainingError, match=r"'\(\)' contains no text"):
        prepare_run(place, accelerator, data=data)


def test_a_resumed_run_equals_an_uninterrupted_one(place, accelerator):
    more = {"optimizer": {"learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_steps": 3, "ema_decay": 0.9}}
    trained(place, accelerator, **named("whole", run={"steps": 6}, **more))
    trained(place, accelerator, **named("parts", run={"steps": 3}, checkpoints={"every_n_steps": 3}, **more))
    later = prepare_run(place, accelerator, **named("parts", run={"steps": 6}, **more))
    later.resume()
    assert later.step == 3
    train(later, accelerator)
    assert same(result(place, "parts"), result(place, "whole"))
    losses = {name: [r["loss"] for r in read_log(place / f"out_{name}" / "log.jsonl")] for name in ("whole", "parts")}
    assert losses["parts"] == losses["whole"]


FORMER_SETTINGS = {
    "model.diffusion_model": "base.model",
    "model.weight_dtype": "base.weight_dtype",
    "model.text_encoders": "base.text_encoders",
    "model.max_sequence_length": "base.text_rows",
    "model.vae": "base.vae",
    "data.type": "data.kind",
    "data.num_validation": "data.held_out",
    "optimizer.learning_rate": "optimiser.learning_rate",
    "optimizer.lr_scheduler": "optimiser.schedule",
    "run.batch_size": "run.batch",
}


def as_former(run: Run) -> None:
    """Rewrite the last checkpoint and the log of a run as version 0.1.0 did."""
    step, state = run.checkpoints.newest()
    settings = {FORMER_SETTINGS.get(key, key): value for key, value in json.loads(state["settings"]).items()}
    trainables = {key.replace("lora.branches.branches", "lora.side.paths"): v for key, v in state["trainables"].items()}
    former = {
        "settings": json.dumps(settings),
        "learning": trainables,
        "optimiser": state["optimizer"],
        "schedule": state["lr_scheduler"],
        "average": {key.replace("lora.branches.branches", "lora.side.paths"): v for key, v in state["ema"].items()},
    }
    run.checkpoints.save(step, former)
    log = run.config.output / "log.jsonl"
    text = log.read_text().replace("grad_norm", "gradient norm").replace("learning_rate", "learning rate")
    log.write_text(text)


def test_runs_of_version_0_1_are_resumed(place, accelerator):
    more = {"optimizer": {"learning_rate": 1e-3, "ema_decay": 0.9}}
    trained(place, accelerator, **named("uninterrupted", run={"steps": 4}, **more))
    as_former(trained(place, accelerator, **named("former", run={"steps": 2}, **more)))
    later = prepare_run(place, accelerator, **named("former", run={"steps": 4}, **more))
    later.resume()
    assert later.step == 2
    train(later, accelerator)
    assert same(result(place, "former"), result(place, "uninterrupted"))
    logs = [read_log(place / f"out_{name}" / "log.jsonl") for name in ("former", "uninterrupted")]
    assert logs[0] == logs[1]
    assert set(logs[0][0]) == {"step", "loss", "grad_norm", "learning_rate"}

    as_former(later)
    other = prepare_run(place, accelerator, **named("former", run={"steps": 4, "batch_size": 2}, **more))
    with pytest.raises(TrainingError, match=r"run\.batch_size was 4, is 2"):
        other.resume()


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(place, accelerator):
    more = {"run": {"steps": 20}, "checkpoints": {"every_n_steps": 2, "keep_last": 2}}
    trained(place, accelerator, **named("never", **more))
    config = write_config(place, named("killed", **more))
    process = started(COMFYUI, ["train", config])
    folder = place / "out_killed" / "checkpoints"
    while len(list(folder.glob("*.pt"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert not (folder / "step_000020.pt").is_file()
    process = started(COMFYUI, ["train", config])
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "Resuming from step" in said
    assert same(result(place, "killed"), result(place, "never"))


def test_two_processes_equal_one(place, accelerator):
    trained(place, accelerator, **named("one", run={"steps": 4, "batch_size": 5, "micro_batch_size": 2}))
    config = write_config(place, named("two", run={"steps": 4, "batch_size": 5, "micro_batch_size": 2}))
    process = started(COMFYUI, ["train", config], processes=2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert apart(result(place, "two"), result(place, "one")) < 1e-3
    assert apart(result(place, "whole"), result(place, "one")) > 0.1


def test_other_settings_are_refused(place, accelerator):
    other = prepare_run(place, accelerator, **named("whole", adapter={"rank": 4}, run={"steps": 6, "seed": 5}))
    with pytest.raises(TrainingError, match=r"run.seed was 0, is 5"):
        other.resume()


def test_settings_that_may_change(place, accelerator, caplog, tmp_path):
    """A lower learning rate, as the error about losses advises; another micro_batch_size; images that were moved."""
    one = trained(place, accelerator, **named("careful", optimizer={"learning_rate": 1e-3}, run={"steps": 2}))
    shutil.copytree(place / "images", tmp_path / "moved")
    moved = {**one.config.model_dump(mode="json")["data"], "images": str(tmp_path / "moved")}
    changes = {"optimizer": {"learning_rate": 1e-4}, "run": {"steps": 4, "micro_batch_size": 1}, "data": moved}
    other = prepare_run(place, accelerator, **named("careful", **changes))
    with caplog.at_level(logging.WARNING):
        other.resume()
    assert other.step == 2
    assert "optimizer.learning_rate was 0.001, is 0.0001" in caplog.text
    other.train_step()
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_stop_signal_is_never_lost(place, accelerator, monkeypatch):
    """It arrives during a step; a run stops after the next reduction and saves the step."""
    run = prepare_run(place, accelerator, **named("told", run={"steps": 9}, checkpoints={"every_n_steps": 5}))
    run.config.output.mkdir(exist_ok=True)
    reduce = accelerator.reduce

    def told(*args, **kwargs):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return reduce(*args, **kwargs)

    monkeypatch.setattr(accelerator, "reduce", told)
    train(run, accelerator)
    assert run.step == 4
    assert run.checkpoints.steps == [4]
    assert (place / "out_told" / "told.safetensors").is_file()


def test_a_missing_adapter_of_the_last_step_is_written(place, accelerator):
    trained(place, accelerator, **named("ended", run={"steps": 2}))
    file = place / "out_ended" / "ended.safetensors"
    before = load_file(file)
    file.unlink()
    again = prepare_run(place, accelerator, **named("ended", run={"steps": 2}))
    again.resume()
    train(again, accelerator)
    assert same(load_file(file), before)


def test_ema_weights_are_rendered(place, accelerator):
    more = {
        "optimizer": {"learning_rate": 1e-3, "ema_decay": 0.9},
        "validation": {"every_n_steps": 2, "strengths": [0.0, 1.0]},
    }
    trained(place, accelerator, **named("averaged", run={"steps": 2}, **more))
    assert (place / "out_averaged" / "validation" / "step_000002" / "curves.json").is_file()


def test_prompts_of_different_length_are_not_batched(place, accelerator):
    long = "make the circle as red as the reddest of all red things that anybody has ever seen and then some more"
    data = {"type": "combinations", "images": "images", "instructions": ["make it red", long], "num_examples": 12}
    run = prepare_run(place, accelerator, data=data, model={"max_sequence_length": 8})
    loss, _ = run.train_step()
    assert loss > 0


def test_a_full_disk_loses_nothing(place, accelerator, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = prepare_run(place, accelerator, **named("full", run={"steps": 4}, checkpoints={"every_n_steps": 1}))
    run.config.output.mkdir(exist_ok=True)
    whole = checkpoints.atomic_write
    tries = []

    def sometimes(file, content):
        tries.append(file.name)
        return full() if file.name == "step_000002.pt" else whole(file, content)

    monkeypatch.setattr(checkpoints, "atomic_write", sometimes)
    with caplog.at_level(logging.WARNING):
        train(run, accelerator)
    assert "Step 2 cannot be written" in caplog.text
    assert tries == [f"step_{k:06}.pt" for k in (1, 2, 3, 4)]
    assert run.checkpoints.steps == [1, 3, 4]

    again = prepare_run(place, accelerator, **named("full2", run={"steps": 2}, checkpoints={"every_n_steps": 1}))
    again.config.output.mkdir(exist_ok=True)

    def never(file, content):
        return full() if file.name == "step_000002.pt" else whole(file, content)

    monkeypatch.setattr(checkpoints, "atomic_write", never)
    with pytest.raises(TrainingError, match="the last complete checkpoint is of step 1"):
        train(again, accelerator)
    assert again.checkpoints.steps == [1]
    assert not list(again.checkpoints.folder.glob("*.part"))


def test_a_run_continues_when_logs_cannot_be_written(place, accelerator, caplog, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    run = prepare_run(
        place, accelerator, **named("unlogged", run={"steps": 2}, validation={"every_n_steps": 1, "steps": 1})
    )
    monkeypatch.setattr(accelerator, "log", full)
    with caplog.at_level(logging.WARNING):
        run.config.output.mkdir(exist_ok=True)
        train(run, accelerator)
    assert run.checkpoints.steps == [2]
    assert "Logs and images cannot be written" in caplog.text


def test_the_last_checkpoints_are_kept(place, accelerator):
    run = trained(
        place, accelerator, **named("kept", run={"steps": 5}, checkpoints={"every_n_steps": 1, "keep_last": 2})
    )
    assert run.checkpoints.steps == [4, 5]
    (run.checkpoints.folder / "step_000005.pt").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="resume from step 4"):
        run.resume()


def test_a_loss_that_is_not_finite_changes_nothing(place, accelerator):
    run = prepare_run(place, accelerator)
    with torch.no_grad():
        next(iter(run.trainables.parameters())).fill_(float("nan"))
    before = [parameter.clone() for parameter in run.trainables.parameters()]
    with pytest.raises(TrainingError, match="not finite"):
        run.train_step()
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(run.trainables.parameters(), before))


def test_images_and_curves_of_validation_examples(place, accelerator):
    trained(
        place,
        accelerator,
        **named("seen", run={"steps": 2}, validation={"every_n_steps": 2, "strengths": [0.0, 1.0, 2.0]}),
    )
    folder = place / "out_seen" / "validation" / "step_000002"
    curves = json.loads((folder / "curves.json").read_text())
    sheets = [Image.open(folder / f"{k}.png").size for k in range(2)]
    lines = sum(size[0] == 4 * 64 + 3 * 6 for size in sheets)
    assert lines == len(curves)
    for curve in curves:
        assert curve["strengths"] == [0, 1, 2]
        assert len(curve["distances"]) == 3
    assert (place / "out_seen" / "loss.png").is_file()
    assert (place / "out_seen" / "validation.png").is_file() == bool(curves)


@pytest.fixture(scope="module")
def files(place, accelerator):
    """An adapter file of each method."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "in_training", True)
        write_edit_strips(place / "edit_strips", 3)
        changes = {
            "stlora": {},
            "gstlora": {"method": "gstlora"},
            "projector": {
                "method": "projector",
                "data": {"type": "edit_strips", "path": "edit_strips", "num_validation": 1},
            },
        }
        found = {}
        for method, more in changes.items():
            fast = {"optimizer": {"learning_rate": 0.03}, "run": {"steps": 5}}
            trained(place, accelerator, **named(f"file_{method}", **fast, **more))
            found[method] = place / f"out_file_{method}" / f"file_{method}.safetensors"
    return found


def test_files_are_described(files, capsys):
    for method, kind in (("stlora", "STLoRA"), ("gstlora", "GSTLoRA")):
        adapter = read_adapter(files[method])
        assert adapter.adapter_type == kind
        assert adapter.ranks == [4]
        metadata = read_metadata(files[method])
        assert (metadata["method"], metadata["steps"], metadata["rank"]) == (method, 5, 4)
    bundle = read_projector(files["projector"])
    assert bundle.lora is not None
    assert main(["inspect", str(files["projector"]), "--comfyui", str(COMFYUI)]) == 0
    assert "strength projector for hidden size 128" in capsys.readouterr().out


def test_metadata_of_version_0_1_is_read():
    metadata = read_metadata(REPO / "demo" / "miniature" / "loras" / "miniature-stlora.safetensors")
    assert (metadata["model"], metadata["model_file"]) == ("FLUX.1", "miniature-kontext.safetensors")
    assert (metadata["max_sequence_length"], metadata["pack_version"]) == (32, "0.1.0")


def test_a_dry_run_saves_nothing(place, capsys):
    config = write_config(place, named("dry", run={"steps": 50}))
    assert main(["train", str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "9 for training, 2 for validation" in said
    assert re.search(r"time: \d+\.\d\d s per step, .* for 50 steps", said)
    assert not list((place / "out_dry").rglob("*.pt"))
    assert not (place / "out_dry" / "dry.safetensors").exists()


def test_adapters_are_evaluated(files, place, capsys):
    """Adapters trained here, by each method, and a file of the authors."""
    few = {"validation": {"strengths": [0.0, 0.5, 1.0], "steps": 2}}
    stacks = {"method": "projector", "data": {"type": "edit_strips", "path": "edit_strips", "num_validation": 1}}
    for method, more in (("stlora", {}), ("gstlora", {"method": "gstlora"}), ("projector", stacks)):
        config = write_config(place, named(f"file_{method}", **few, **more))
        assert main(["evaluate", str(config)]) == 0
        folder = place / f"out_file_{method}" / "evaluation" / f"file_{method}"
        assert "rising: " in capsys.readouterr().out
        strip, grid = 4 * 64 + 3 * 6, 3 * 64 + 2 * 6
        assert Image.open(folder / "0.png").width in ((strip, grid) if method == "stlora" else (strip,))
        assert (folder / "curves.png").is_file()
    config = write_config(place, named("file_stlora", **few))
    assert main(["evaluate", str(config), "--adapter", str(place / "models" / "loras" / "selective_lora.pt")]) == 0
    assert (
        main(["evaluate", str(config), "--adapter", str(place / "models" / "loras" / "wrong_width.safetensors")]) == 1
    )
    assert "does not fit the model" in capsys.readouterr().err


def test_the_quickstart_has_all_it_needs(tmp_path, capsys):
    assert main(["quickstart", str(tmp_path), "--comfyui", str(COMFYUI)]) == 0
    command = capsys.readouterr().out.split()
    assert command[:4] == ["python", "-m", "training", "train"]
    assert main(["train", command[-1], "--dry-run"]) == 0
    assert "118 for training" in capsys.readouterr().out


def test_exported_files_equal_the_authors_in_format(golden_model, tmp_path):
    """Keys and shapes of an adapter for the golden model are those of the authors' files."""
    base = FrozenModel(golden_model)
    examples = GOLDEN / "examples"
    for method, kind, exported in (
        ("stlora", "STLoRA", {"selective_lora.pt": "selective_lora.pt"}),
        ("gstlora", "GSTLoRA", {"pytorch_lora_weights.safetensors": "gstlora_pytorch_lora_weights.safetensors"}),
        (
            "projector",
            "GSTLoRA",
            {
                "pytorch_lora_weights.safetensors": "kk_pytorch_lora_weights.safetensors",
                "slider_projector.pth": "slider_projector.pth",
            },
        ),
    ):
        tensors = TrainableLora(base, kind, 4, seed=0).tensors()
        if method == "projector":
            tensors |= TrainableProjector(base, seed=0).tensors()
        file = tmp_path / f"{method}.safetensors"
        write_adapter(file, tensors, {"method": method})
        assert {written.name for written in export_adapter(file, tmp_path / method)} == set(exported)
        for name, example in exported.items():
            ours, theirs = (tensors_of(place) for place in (tmp_path / method / name, examples / example))
            assert shapes(ours, {}) == shapes(theirs, {64: 512} if "projector" in example else {})
            assert {value.dtype for value in ours.values()} == {torch.float32}
    write_adapter(tmp_path / "odd.safetensors", tensors, {})
    with pytest.raises(TrainingError, match="does not name a known training method"):
        export_adapter(tmp_path / "odd.safetensors", tmp_path)


def shapes(tensors, wider) -> dict[str, list[int]]:
    """wider: sizes of a narrow example -> those of the golden model."""
    return {key: [wider.get(size, size) for size in value.shape] for key, value in tensors.items()}


def tensors_of(file) -> dict[str, torch.Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def test_trained_files_change_the_image(files, server):
    for method, file in files.items():
        shutil.copy(file, server.base / "models" / "loras" / f"trained_{method}.safetensors")

    def latent(graph, model, conditioning):
        node = graph.save(graph.sample(model, graph.edited(conditioning)))
        result = server.run(graph)
        assert result.ok, result.error
        return torch.from_numpy(result.latent(node))

    found = {}
    for strength in (0.0, 1.0):
        g = Graph()
        text = g.strengths(g.instructions("make it night"), strength)
        found["stlora", strength] = latent(g, g.stlora(g.model(), "trained_stlora.safetensors"), text)
        g = Graph()
        model = g.gstlora(g.model(), strength, "trained_gstlora.safetensors")
        found["gstlora", strength] = latent(g, model, g.instructions("make it night"))
        g = Graph()
        bundle = {"name": "trained_projector.safetensors", "lora": "none, or in the projector's file"}
        text = g.at(g.instructions("make it red"), strength, **bundle)
        found["projector", strength] = latent(g, g.projected(g.model(), **bundle), text)
    g = Graph()
    bare = latent(g, g.model(), g.instructions("make it night"))
    for method in ("stlora", "gstlora"):
        assert torch.equal(found[method, 1.0], bare)
    for method in files:
        assert (found[method, 0.0] - found[method, 1.0]).abs().max() > 1e-3
