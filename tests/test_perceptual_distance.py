"""LPIPS and DreamSim against their packages, with random weights, and the errors for missing packages and files."""

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
from test_sweep_metrics import image_batch, strength_list
from torchvision.models import alexnet

from slider_core.errors import SliderError
from slider_core.metrics.perceptual_distance import LpipsDistance, dreamsim_distances, lpips_distances

FILE = "alexnet-owt-7be5be79.pth"


def save_weights(home: Path, weights: object) -> Path:
    """Save AlexNet's weights where torchvision loads them from, in TORCH_HOME `home`."""
    file = home / "hub" / "checkpoints" / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, file)
    return file


@pytest.fixture(scope="module")
def random_weights() -> dict[str, torch.Tensor]:
    """AlexNet's state dict; the classifier, which LPIPS does not use, is an expanded zero and takes no disk space."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        weights = alexnet().state_dict()
    return OrderedDict(
        (name, torch.zeros(1).expand(value.shape) if "classifier" in name else value) for name, value in weights.items()
    )


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def connections(monkeypatch) -> list[object]:
    """Addresses of attempted connections, all of which fail."""
    addresses: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        addresses.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return addresses


class MakesFolder:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def sweep(count: int, height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(1))


# --- distances


def test_lpips_equals_the_package(home, random_weights, connections):
    """The package loads the same file itself and takes images from -1 to 1."""
    save_weights(home, random_weights)
    network = lpips.LPIPS(net="alex", verbose=False)
    images = sweep(4)
    scaled = images.movedim(-1, 1) * 2 - 1

    def reference(i: int, j: int) -> float:
        with torch.inference_mode():
            return network(scaled[i : i + 1], scaled[j : j + 1]).item()

    distances = lpips_distances(images, source_index=2)
    assert distances.adjacent == pytest.approx([reference(k, k + 1) for k in range(3)], rel=1e-4)
    assert distances.skip_one == pytest.approx([reference(k, k + 2) for k in range(2)], rel=1e-4)
    assert distances.from_source == pytest.approx([reference(2, k) for k in range(4)], rel=1e-4)
    assert len({round(value, 6) for value in (*distances.adjacent, *distances.skip_one)}) == 5
    assert distances.metric_name == "LPIPS (AlexNet)"
    assert connections == []


def test_equal_images_have_distance_0(home, random_weights):
    save_weights(home, random_weights)
    images = sweep(3)
    images[2] = images[1]
    distances = lpips_distances(images, source_index=1)
    assert distances.adjacent[1] == 0
    assert distances.from_source[1:] == (0, 0)
    assert distances.adjacent[0] > 0


def test_alpha_channel_is_ignored(home, random_weights):
    save_weights(home, random_weights)
    images = sweep(2)
    transparent = torch.cat([images, torch.rand(2, 48, 64, 1)], -1)
    assert lpips_distances(transparent) == lpips_distances(images)


def test_two_images_of_any_type(home, random_weights):
    """PIL images, uint8 tensors and floats from 0 to 1 have the same distance."""
    save_weights(home, random_weights)
    pixels = (sweep(2) * 255).round().to(torch.uint8)
    lpips_distance = LpipsDistance()
    pair = [Image.fromarray(image.numpy()) for image in pixels]
    distances = [lpips_distance(*pair), lpips_distance(*pixels), lpips_distance(*pixels / 255)]
    assert distances == pytest.approx([*lpips_distances(pixels / 255).adjacent] * 3, rel=1e-5)
    assert distances[0] > 0


def test_path_lengths_are_additive(home, random_weights):
    """LPIPS itself is quadratic for small changes: two half steps sum to half of the full step."""
    save_weights(home, random_weights)
    start, end = sweep(2)
    images = torch.stack([start + fraction * 0.02 * (end - start) for fraction in (0, 0.5, 1)])
    distances = lpips_distances(images)
    direct = lpips_distances(images[::2])
    assert sum(distances.path_lengths()) == pytest.approx(sum(direct.path_lengths()), rel=0.05)
    assert sum(distances.adjacent) == pytest.approx(sum(direct.adjacent) / 2, rel=0.05)


def test_interrupted_run_stops(home, random_weights):
    save_weights(home, random_weights)
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        lpips_distances(sweep(2))


# --- errors


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SliderError, match="pip install lpips"):
        lpips_distances(sweep(2))


def test_missing_weights_are_not_downloaded(home, connections):
    with pytest.raises(SliderError, match="Nothing is downloaded") as error:
        lpips_distances(sweep(2))
    assert str(home / "hub" / "checkpoints" / FILE) in str(error.value)
    assert connections == []
    assert list(home.iterdir()) == []


def test_pickled_code_is_not_executed(home):
    save_weights(home, {"features.0.weight": MakesFolder(home / "it ran")})
    with pytest.raises(SliderError, match=f"{FILE} cannot be read as torchvision's AlexNet"):
        lpips_distances(sweep(2))
    assert not (home / "it ran").exists()


@pytest.mark.parametrize("defect", ["missing tensor", "wrong shape"])
def test_weights_of_another_network(home, random_weights, defect):
    weights = dict(random_weights)
    if defect == "missing tensor":
        del weights["features.3.bias"]
    else:
        weights["features.3.bias"] = torch.zeros(7)
    file = save_weights(home, weights)
    with pytest.raises(SliderError, match="is not torchvision's AlexNet") as error:
        lpips_distances(sweep(2))
    assert str(file) in str(error.value)


def test_values_that_are_not_finite(home, random_weights):
    images = sweep(3)
    images[1, 0, 0, 0] = math.nan
    with pytest.raises(SliderError, match="The images contain values that are not finite"):
        lpips_distances(images)
    save_weights(home, {**random_weights, "features.0.bias": torch.full((64,), math.nan)})
    with pytest.raises(SliderError, match=r"LPIPS \(AlexNet\): the distances are not finite"):
        lpips_distances(sweep(2))


def test_small_images(home, random_weights):
    save_weights(home, random_weights)
    with pytest.raises(SliderError, match="The images are 64 x 30 pixels; LPIPS needs at least 31"):
        lpips_distances(sweep(2, 30, 64))
    assert lpips_distances(sweep(2, 31, 31)).adjacent[0] > 0


# --- DreamSim


NETWORK = "open_clip_vitb32"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random checkpoint in the authors' layout, from their network and PEFT; OpenCLIP's weights in float16."""
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
        adapted = get_peft_model(
            torch.nn.ModuleDict({"extractor_list": torch.nn.ModuleList([Extractor(network)])}), lora
        )
        for name, value in adapted.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(value, std=0.05)
    adapted.save_pretrained(adapter)
    return folder


class Extractor(torch.nn.Module):
    """Holds a network as DreamSim's extractor_list does."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model


def test_dreamsim_equals_the_package(checkpoint, connections):
    """The package loads the adapter with PEFT, takes two images at a time and returns 1 - cosine."""
    network, prepare = dreamsim(device="cpu", cache_dir=str(checkpoint), dreamsim_type=NETWORK)
    images = torch.cat([sweep(4), torch.full((4, 48, 64, 1), 0.5)], -1)
    inputs = [prepare(Image.fromarray((image[..., :3] * 255).round().to(torch.uint8).numpy())) for image in images]

    def reference(i: int, j: int) -> float:
        with torch.inference_mode():
            return network(inputs[i], inputs[j]).item()

    distances = dreamsim_distances(images, checkpoint, source_index=2)
    assert distances.adjacent == pytest.approx([reference(k, k + 1) for k in range(3)], rel=1e-3)
    assert distances.skip_one == pytest.approx([reference(k, k + 2) for k in range(2)], rel=1e-3)
    assert distances.from_source == pytest.approx([reference(2, k) for k in range(4)], rel=1e-3, abs=1e-6)
    assert len({round(value, 6) for value in (*distances.adjacent, *distances.skip_one)}) == 5
    assert distances.squared
    assert distances.metric_name == "DreamSim (OpenCLIP ViT-B/32), 1 - cosine"
    assert connections == []


FILES = (
    f"{NETWORK}_pretrain.pth.tar",
    f"{NETWORK}_single_lora/adapter_config.json",
    f"{NETWORK}_single_lora/adapter_model.safetensors",
)


def link_checkpoint(checkpoint: Path, folder: Path, omitted: str) -> Path:
    """Hard-link the checkpoint into `folder`, without one of its files; returns the folder."""
    for file in {*FILES} - {omitted}:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).hardlink_to(checkpoint / file)
    return folder


@pytest.mark.parametrize("missing", FILES)
def test_missing_dreamsim_file(checkpoint, tmp_path, connections, missing):
    link_checkpoint(checkpoint, tmp_path, missing)
    with pytest.raises(SliderError, match="Nothing is downloaded") as error:
        dreamsim_distances(sweep(2), tmp_path)
    assert str(tmp_path / missing) in str(error.value)
    assert connections == []


def test_missing_dreamsim_package(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(SliderError, match="pip install dreamsim"):
        dreamsim_distances(sweep(2), checkpoint)


@pytest.mark.parametrize("defect", ["missing layers", "another network"])
def test_wrong_dreamsim_adapter(checkpoint, tmp_path, defect):
    link_checkpoint(checkpoint, tmp_path, FILES[2])
    adapter = load_file(checkpoint / FILES[2])
    other = {"base_model.model.other.lora_A.weight": torch.zeros(4, 4)}
    save_file(dict(list(adapter.items())[2:]) if defect == "missing layers" else other, tmp_path / FILES[2])
    with pytest.raises(SliderError, match=r"adapter_model.safetensors lacks .*; expected DreamSim's adapter"):
        dreamsim_distances(sweep(2), tmp_path)


def test_pickled_code_and_wrong_files_of_dreamsim(checkpoint, tmp_path):
    folder = link_checkpoint(checkpoint, tmp_path, FILES[2])
    base, config, tensors = (folder / name for name in FILES)
    torch.save({"lora": MakesFolder(tmp_path / "it ran")}, tensors.with_suffix(".bin"))
    with pytest.raises(SliderError, match=r"adapter_model.bin cannot be read as DreamSim's adapter"):
        dreamsim_distances(sweep(2), tmp_path)
    tensors.hardlink_to(checkpoint / FILES[2])
    base.unlink()
    torch.save({"state_dict": {"norm.weight": MakesFolder(tmp_path / "it ran")}}, base)
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


# --- nodes


def test_node_with_dreamsim(server, checkpoint):
    """Without the checkpoint the error contains its path; with it the node measures."""
    folder = server.base / "models" / "dreamsim"
    results = []
    for _ in range(2):
        g = Graph()
        images, strengths = image_batch(g, 0x203040, 0x705030, 0xE0D0F0), strength_list(g, "0 .5 1")
        output, _ = g.add("EditSlidersMeasureSweep", images=images, strengths=strengths, distance="DreamSim")
        text = g.add("PreviewAny", source=[output, 0])[0]
        results.append((server.run(g), text))
        if not folder.exists():
            folder.symlink_to(checkpoint)
    (missing, _), (measured, text) = results
    assert not missing.ok
    assert str(folder / f"{NETWORK}_pretrain.pth.tar") in missing.error["exception_message"]
    assert measured.ok, measured.error["exception_message"]
    assert "compared by DreamSim (OpenCLIP ViT-B/32)" in measured.text(text)


def test_nodes_with_lpips(server, random_weights):
    """Without the weights the error contains their path; with them the nodes measure."""
    colors = (0x203040, 0x705030, 0xE0D0F0)
    images = torch.tensor([[color >> shift & 255 for shift in (16, 8, 0)] for color in colors]) / 255
    images = images[:, None, None].expand(-1, 32, 32, -1)
    home = server.base / "torch"

    def run(node: str):
        g = Graph()
        output, _ = g.add(node, images=image_batch(g, *colors), strengths=strength_list(g, "0 .5 1"), distance="LPIPS")
        texts = [g.add("PreviewAny", source=[output, index])[0] for index in (0, 1 if "Measure" in node else 2)]
        result = server.run(g)
        return result, texts

    nodes = ("EditSlidersMeasureSweep", "EditSlidersCalibrate")
    for node in nodes:
        result, _ = run(node)
        assert not result.ok
        assert str(home / "hub" / "checkpoints" / FILE) in result.error["exception_message"]
    save_weights(home, random_weights)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TORCH_HOME", str(home))
        expected = lpips_distances(images)

    (measured, texts), (calibrated, others) = map(run, nodes)
    assert measured.ok, measured.error["exception_message"]
    assert "compared by LPIPS (AlexNet)" in measured.text(texts[0])
    distances = json.loads(measured.text(texts[1]))["distances"]
    assert distances["adjacent"] == pytest.approx(expected.adjacent, rel=1e-4)
    assert distances["squared"] is True
    assert calibrated.ok, calibrated.error
    first, second = expected.path_lengths()
    assert json.loads(calibrated.text(others[0]))["positions"] == pytest.approx(
        [0, first / (first + second), 1], abs=2e-3
    )
    assert "compared by LPIPS (AlexNet)" in calibrated.text(others[1])
