"""LPIPS and DreamSim against the packages themselves, with random weights, and what is said where they are missing."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections import OrderedDict
from pathlib import Path

import lpips
import pytest
import torch
from comfy.model_management import InterruptProcessingException, interrupt_current_processing
from dreamsim import dreamsim
from dreamsim.feature_extraction.vision_transformer import vit_base
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from support.graphs import Graph
from test_sweep_metrics import pictures, strengths
from torchvision.models import alexnet

from slider_core.errors import SliderError
from slider_core.metrics.perceptual_distance import LpipsDistance, dreamsim_distances, lpips_distances

FILE = "alexnet-owt-7be5be79.pth"


def put_weights(home: Path, weights: object) -> Path:
    """Where torchvision looks for AlexNet's, in TORCH_HOME."""
    file = home / "hub" / "checkpoints" / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, file)
    return file


@pytest.fixture(scope="module")
def random_weights() -> dict[str, torch.Tensor]:
    """A whole AlexNet's; the classifier, which LPIPS does not use, is one zero and takes no room in a file."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = alexnet().state_dict()
    return OrderedDict(
        (name, torch.zeros(1).expand(value.shape) if "classifier" in name else value) for name, value in found.items()
    )


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def reached(monkeypatch) -> list[object]:
    """Where anything tried to connect to; nothing gets there."""
    asked: list[object] = []

    def refuse(*where: object, **_: object) -> None:
        asked.append(where)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def sweep(count: int, height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(1))


# --- distances


def test_lpips_is_the_package_s_own(home, random_weights, reached):
    """The package reads the same file by itself and gets pictures from -1 to 1."""
    put_weights(home, random_weights)
    network = lpips.LPIPS(net="alex", verbose=False)
    images = sweep(4)
    scaled = images.movedim(-1, 1) * 2 - 1

    def own(one: int, other: int) -> float:
        with torch.inference_mode():
            return network(scaled[one : one + 1], scaled[other : other + 1]).item()

    found = lpips_distances(images, source_index=2)
    assert found.adjacent == pytest.approx([own(k, k + 1) for k in range(3)], rel=1e-4)
    assert found.skip_one == pytest.approx([own(k, k + 2) for k in range(2)], rel=1e-4)
    assert found.from_source == pytest.approx([own(2, k) for k in range(4)], rel=1e-4)
    assert len({round(distance, 6) for distance in (*found.adjacent, *found.skip_one)}) == 5
    assert found.metric_name == "LPIPS (AlexNet)"
    assert reached == []


def test_equal_pictures_have_no_distance(home, random_weights):
    put_weights(home, random_weights)
    images = sweep(3)
    images[2] = images[1]
    found = lpips_distances(images, source_index=1)
    assert found.adjacent[1] == 0
    assert found.from_source[1:] == (0, 0)
    assert found.adjacent[0] > 0


def test_a_fourth_channel_is_left_out(home, random_weights):
    put_weights(home, random_weights)
    images = sweep(2)
    transparent = torch.cat([images, torch.rand(2, 48, 64, 1)], -1)
    assert lpips_distances(transparent) == lpips_distances(images)


def test_two_images_of_any_type(home, random_weights):
    """PIL images, uint8 tensors and floats from 0 to 1 have the same distance."""
    put_weights(home, random_weights)
    pixels = (sweep(2) * 255).round().to(torch.uint8)
    lpips_distance = LpipsDistance()
    pair = [Image.fromarray(image.numpy()) for image in pixels]
    found = [lpips_distance(*pair), lpips_distance(*pixels), lpips_distance(*pixels / 255)]
    assert found == pytest.approx([*lpips_distances(pixels / 255).adjacent] * 3, rel=1e-5)
    assert found[0] > 0


def test_lengths_add_up_along_a_path(home, random_weights):
    """LPIPS itself does not: two small steps are half of the one."""
    put_weights(home, random_weights)
    start, end = sweep(2)
    images = torch.stack([start + share * 0.02 * (end - start) for share in (0, 0.5, 1)])
    found = lpips_distances(images)
    whole = lpips_distances(images[::2])
    assert sum(found.path_lengths()) == pytest.approx(sum(whole.path_lengths()), rel=0.05)
    assert sum(found.adjacent) == pytest.approx(sum(whole.adjacent) / 2, rel=0.05)


def test_an_interrupted_run_stops(home, random_weights):
    put_weights(home, random_weights)
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        lpips_distances(sweep(2))


# --- what is missing or wrong


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SliderError, match="pip install lpips"):
        lpips_distances(sweep(2))


def test_missing_weights_are_named_and_not_downloaded(home, reached):
    with pytest.raises(SliderError, match="Nothing is downloaded") as error:
        lpips_distances(sweep(2))
    assert str(home / "hub" / "checkpoints" / FILE) in str(error.value)
    assert reached == []
    assert list(home.iterdir()) == []


def test_a_file_that_runs_code_is_refused(home):
    put_weights(home, {"features.0.weight": Runs(home / "it ran")})
    with pytest.raises(SliderError, match=f"{FILE} cannot be read as torchvision's AlexNet"):
        lpips_distances(sweep(2))
    assert not (home / "it ran").exists()


@pytest.mark.parametrize("what", ["missing", "of another shape"])
def test_weights_of_something_else(home, random_weights, what):
    weights = dict(random_weights)
    if what == "missing":
        del weights["features.3.bias"]
    else:
        weights["features.3.bias"] = torch.zeros(7)
    file = put_weights(home, weights)
    with pytest.raises(SliderError, match="is not torchvision's AlexNet") as error:
        lpips_distances(sweep(2))
    assert str(file) in str(error.value)


def test_numbers_that_are_not_finite(home, random_weights):
    images = sweep(3)
    images[1, 0, 0, 0] = math.nan
    with pytest.raises(SliderError, match="The images contain values that are not finite"):
        lpips_distances(images)
    put_weights(home, {**random_weights, "features.0.bias": torch.full((64,), math.nan)})
    with pytest.raises(SliderError, match=r"LPIPS \(AlexNet\): the distances are not finite"):
        lpips_distances(sweep(2))


def test_small_pictures(home, random_weights):
    put_weights(home, random_weights)
    with pytest.raises(SliderError, match="The images are 64 x 30 pixels; LPIPS needs at least 31"):
        lpips_distances(sweep(2, 30, 64))
    assert lpips_distances(sweep(2, 31, 31)).adjacent[0] > 0


# --- DreamSim


NETWORK = "open_clip_vitb32"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """In the authors' layout, written by their network and by PEFT; OpenCLIP in half the numbers' precision."""
    folder = tmp_path_factory.mktemp("dreamsim")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = vit_base(patch_size=32)
        network.pos_drop = torch.nn.LayerNorm(network.embed_dim)
        weights = {
            name: (value + 0.02 * torch.randn_like(value)).half() for name, value in network.state_dict().items()
        }
        torch.save({"state_dict": {**weights, "proj": torch.randn(768, 512)}}, folder / f"{NETWORK}_pretrain.pth.tar")
        adapter = folder / f"{NETWORK}_single_lora"
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, bias="none", target_modules=["qkv"])
        adapted = get_peft_model(torch.nn.ModuleDict({"extractor_list": torch.nn.ModuleList([Wrapped(network)])}), lora)
        for name, value in adapted.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(value, std=0.05)
    adapted.save_pretrained(adapter)
    return folder


class Wrapped(torch.nn.Module):
    """As DreamSim keeps its networks."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model


def test_dreamsim_is_the_package_s_own(checkpoint, reached):
    """Which reads the adapter by PEFT, takes two pictures at a time and gives 1 - cosine."""
    network, prepare = dreamsim(device="cpu", cache_dir=str(checkpoint), dreamsim_type=NETWORK)
    images = torch.cat([sweep(4), torch.full((4, 48, 64, 1), 0.5)], -1)
    shown = [prepare(Image.fromarray((picture[..., :3] * 255).round().to(torch.uint8).numpy())) for picture in images]

    def own(one: int, other: int) -> float:
        with torch.inference_mode():
            return network(shown[one], shown[other]).item()

    found = dreamsim_distances(images, checkpoint, source_index=2)
    assert found.adjacent == pytest.approx([own(k, k + 1) for k in range(3)], rel=1e-3)
    assert found.skip_one == pytest.approx([own(k, k + 2) for k in range(2)], rel=1e-3)
    assert found.from_source == pytest.approx([own(2, k) for k in range(4)], rel=1e-3, abs=1e-6)
    assert len({round(distance, 6) for distance in (*found.adjacent, *found.skip_one)}) == 5
    assert found.squared
    assert found.metric_name == "DreamSim (OpenCLIP ViT-B/32), 1 - cosine"
    assert reached == []


FILES = (
    f"{NETWORK}_pretrain.pth.tar",
    f"{NETWORK}_single_lora/adapter_config.json",
    f"{NETWORK}_single_lora/adapter_model.safetensors",
)


def copied(checkpoint: Path, folder: Path, leave_out: str) -> Path:
    """The checkpoint in another folder, without one of its files."""
    for kept in {*FILES} - {leave_out}:
        (folder / kept).parent.mkdir(parents=True, exist_ok=True)
        (folder / kept).hardlink_to(checkpoint / kept)
    return folder


@pytest.mark.parametrize("missing", FILES)
def test_what_dreamsim_needs_is_named(checkpoint, tmp_path, reached, missing):
    copied(checkpoint, tmp_path, missing)
    with pytest.raises(SliderError, match="Nothing is downloaded") as error:
        dreamsim_distances(sweep(2), tmp_path)
    assert str(tmp_path / missing) in str(error.value)
    assert reached == []


def test_the_missing_package_dreamsim_is_named(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(SliderError, match="pip install dreamsim"):
        dreamsim_distances(sweep(2), checkpoint)


@pytest.mark.parametrize("what", ["of some layers", "of another network"])
def test_another_adapter(checkpoint, tmp_path, what):
    copied(checkpoint, tmp_path, FILES[2])
    whole = load_file(checkpoint / FILES[2])
    some = {"base_model.model.other.lora_A.weight": torch.zeros(4, 4)}
    save_file(dict(list(whole.items())[2:]) if what == "of some layers" else some, tmp_path / FILES[2])
    with pytest.raises(SliderError, match=r"adapter_model.safetensors lacks .*; expected DreamSim's adapter"):
        dreamsim_distances(sweep(2), tmp_path)


def test_files_of_dreamsim_that_run_code_or_are_something_else(checkpoint, tmp_path):
    folder = copied(checkpoint, tmp_path, FILES[2])
    base, config, tensors = (folder / name for name in FILES)
    torch.save({"lora": Runs(tmp_path / "it ran")}, tensors.with_suffix(".bin"))
    with pytest.raises(SliderError, match=r"adapter_model.bin cannot be read as DreamSim's adapter"):
        dreamsim_distances(sweep(2), tmp_path)
    tensors.hardlink_to(checkpoint / FILES[2])
    base.unlink()
    torch.save({"state_dict": {"norm.weight": Runs(tmp_path / "it ran")}}, base)
    with pytest.raises(SliderError, match=r"pretrain.pth.tar cannot be read as DreamSim's OpenCLIP"):
        dreamsim_distances(sweep(2), tmp_path)
    torch.save({"state_dict": {"norm.weight": torch.zeros(768)}}, base)
    with pytest.raises(SliderError, match="does not contain DreamSim's checkpoint"):
        dreamsim_distances(sweep(2), tmp_path)
    base.unlink()
    base.hardlink_to(checkpoint / FILES[0])
    config.unlink()
    config.write_text("[]", encoding="utf-8")
    with pytest.raises(SliderError, match="does not contain DreamSim's checkpoint"):
        dreamsim_distances(sweep(2), tmp_path)
    assert not (tmp_path / "it ran").exists()


# --- the nodes


def test_nodes_compare_by_dreamsim(server, checkpoint):
    """First without the checkpoint, which is named; then with it."""
    folder = server.base / "models" / "dreamsim"
    results = []
    for _ in range(2):
        g = Graph()
        images, listed = pictures(g, 0x203040, 0x705030, 0xE0D0F0), strengths(g, "0 .5 1")
        made, _ = g.add("EditSlidersMeasureSweep", images=images, strengths=listed, distance="DreamSim")
        text = g.add("PreviewAny", source=[made, 0])[0]
        results.append((server.run(g), text))
        if not folder.exists():
            folder.symlink_to(checkpoint)
    (missing, _), (measured, text) = results
    assert not missing.ok
    assert str(folder / f"{NETWORK}_pretrain.pth.tar") in missing.error["exception_message"]
    assert measured.ok, measured.error["exception_message"]
    assert "compared by DreamSim (OpenCLIP ViT-B/32)" in measured.text(text)


def test_nodes_compare_by_lpips(server, random_weights):
    """First without weights, which are named; then with them."""
    colours = (0x203040, 0x705030, 0xE0D0F0)
    images = torch.tensor([[colour >> shift & 255 for shift in (16, 8, 0)] for colour in colours]) / 255
    images = images[:, None, None].expand(-1, 32, 32, -1)
    home = server.base / "torch"

    def run(node: str):
        g = Graph()
        made, _ = g.add(node, images=pictures(g, *colours), strengths=strengths(g, "0 .5 1"), distance="LPIPS")
        texts = [g.add("PreviewAny", source=[made, output])[0] for output in (0, 1 if "Measure" in node else 2)]
        result = server.run(g)
        return result, texts

    nodes = ("EditSlidersMeasureSweep", "EditSlidersCalibrate")
    for node in nodes:
        result, _ = run(node)
        assert not result.ok
        assert str(home / "hub" / "checkpoints" / FILE) in result.error["exception_message"]
    put_weights(home, random_weights)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_HOME", str(home))
        own = lpips_distances(images)

    (measured, texts), (calibrated, others) = map(run, nodes)
    assert measured.ok, measured.error["exception_message"]
    assert "compared by LPIPS (AlexNet)" in measured.text(texts[0])
    distances = json.loads(measured.text(texts[1]))["distances"]
    assert distances["adjacent"] == pytest.approx(own.adjacent, rel=1e-4)
    assert distances["squared"] is True
    assert calibrated.ok, calibrated.error
    first, second = own.path_lengths()
    assert json.loads(calibrated.text(others[0]))["positions"] == pytest.approx(
        [0, first / (first + second), 1], abs=2e-3
    )
    assert "compared by LPIPS (AlexNet)" in calibrated.text(others[1])
