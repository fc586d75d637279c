"""Adapter files: every format gives the same weight deltas; unusable files are rejected with a clear error."""

from __future__ import annotations

import json
import os
import pickle
import re

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from slider_core import node_names as names
from slider_core.adapters.adapter_file import read_adapter
from slider_core.adapters.gstlora import apply_gstlora
from slider_core.adapters.stlora import apply_stlora
from slider_core.errors import SliderError
from slider_core.families import family_of

STLORA = GOLDEN / "examples" / "selective_lora.pt"
GSTLORA = GOLDEN / "examples" / "gstlora_pytorch_lora_weights.safetensors"
HIDDEN, RANK = 256, 4
QKV = {"to_q": "img", "to_k": "img", "to_v": "img", "add_q_proj": "txt", "add_k_proj": "txt", "add_v_proj": "txt"}


@pytest.fixture(scope="module")
def peft() -> dict[str, torch.Tensor]:
    return load_file(GSTLORA)


def weight_deltas(path) -> dict[str, torch.Tensor]:
    """Target -> weight delta (out_features, in_features), computed by the adapter's LoRA branches at strength 0."""
    deltas = {}
    branches = read_adapter(path).lora_branches
    for name, branch in zip(branches.paths, branches.branches):
        in_features = branch.down.weight.shape[1]
        out_features = max(r.stop for r in branch.features)
        deltas[name] = branch(torch.zeros(in_features, out_features), torch.eye(in_features), torch.tensor(1.0)).T
    return deltas


def same_deltas(a: dict, b: dict, factor: float = 1.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k] * factor, b[k], atol=1e-5) for k in a)


def save(tmp_path, tensors: dict, metadata: dict | None = None):
    path = tmp_path / "adapter.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def peft_header(**declared) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in declared.items()})}


def rename_keys(peft: dict, rename) -> dict:
    return {rename(k): v for k, v in peft.items()}


def kohya_keys(prefix: str):
    def rename(key: str) -> str:
        module, _, kind = key.removeprefix("transformer.").rpartition(".lora_")
        return prefix + module.replace(".", "_") + (".lora_down.weight" if kind == "A.weight" else ".lora_up.weight")

    return rename


KEY_FORMATS = {
    "no prefix": lambda k: k.removeprefix("transformer."),
    "diffusion_model": lambda k: k.replace("transformer.", "diffusion_model.", 1),
    "base_model": lambda k: k.replace("transformer.", "base_model.model.", 1),
    "default adapter": lambda k: k.replace(".weight", ".default.weight"),
    "old diffusers": lambda k: k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."),
    "kohya": kohya_keys("lora_unet_"),
    "onetrainer": kohya_keys("lora_transformer_"),
    "lycoris": kohya_keys("lycoris_"),
}


@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_key_formats(peft, tmp_path, key_format):
    path = save(tmp_path, rename_keys(peft, KEY_FORMATS[key_format]))
    assert same_deltas(weight_deltas(GSTLORA), weight_deltas(path))
    assert read_adapter(path).adapter_type == "GSTLoRA"


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
def test_fused_comfyui_names(peft, tmp_path, prefix):
    expected = weight_deltas(GSTLORA)
    fused = {}
    for module, delta in expected.items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        name = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        if module.endswith("linear1"):
            name += "_qkv"
        rank = 3 * RANK
        fused[f"{name}.lora_down.weight"] = v[:rank]
        fused[f"{name}.lora_up.weight"] = u[:, :rank] * s[:rank]
        fused[f"{name}.alpha"] = torch.tensor(float(rank))
    assert same_deltas(expected, weight_deltas(save(tmp_path, fused)))


def test_alpha_tensor(peft, tmp_path):
    alphas = {k.replace(".lora_A.weight", ".alpha"): torch.tensor(2.0) for k in peft if ".lora_A." in k}
    assert same_deltas(weight_deltas(GSTLORA), weight_deltas(save(tmp_path, peft | alphas)), 2.0 / RANK)


@pytest.mark.parametrize(
    ("declared", "factor"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 4}, 1.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 2, "attn.to_k": 2}}, None),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {r"attn\.to_q": 2, "to_k": 2}}, None),
        ({"r": 4, "lora_alpha": None, "alpha_pattern": None}, 1.0),
    ],
)
def test_header_alpha(peft, tmp_path, declared, factor):
    loaded, expected = weight_deltas(save(tmp_path, peft, peft_header(**declared))), weight_deltas(GSTLORA)
    if factor is not None:
        assert same_deltas(expected, loaded, factor)
        return
    for module in expected:
        halved = expected[module].clone()
        if module.endswith(("img_attn.qkv", "linear1")):
            halved[: 2 * HIDDEN] /= 2
        assert torch.allclose(loaded[module], halved, atol=1e-5), module


def test_adapter_type_and_description(golden_model):
    st, gst = read_adapter(STLORA), read_adapter(GSTLORA)
    assert (st.adapter_type, st.ranks, st.family.name) == ("STLoRA", [4], "FLUX.1")
    assert (gst.adapter_type, gst.ranks, gst.family.name) == ("GSTLoRA", [4], "FLUX.1")
    text = st.describe()
    for detail in ("STLoRA", "FLUX.1", "rank: 4", "double_blocks 0-2", "txt_attn.qkv (q, k, v)", "txt_mlp.2"):
        assert detail in text
    assert "single_blocks" not in text
    assert "linear1 (q, k, v)" in gst.describe()
    assert family_of(golden_model) is st.family


def test_applying_adapters_does_not_modify_the_model(golden_model):
    before = {k: v.clone() for k, v in golden_model.model.state_dict().items()}
    apply_stlora(apply_gstlora(golden_model, read_adapter(GSTLORA), 0.0), read_adapter(STLORA))
    assert golden_model.wrappers == {}
    assert golden_model.attachments == {}
    assert all(torch.equal(before[k], v) for k, v in golden_model.model.state_dict().items())


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_pickles_are_not_executed(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    with path.open("wb") as file:
        pickle.dump(Hostile(marker), file)
    torch.save({"a": Hostile(marker)}, tmp_path / "hostile_zip.pt")
    for bad in (path, tmp_path / "hostile_zip.pt"):
        with pytest.raises(SliderError, match="contains only tensors"):
            read_adapter(bad)
    assert not marker.exists()


def test_unreadable_files(tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(GSTLORA.read_bytes()[:5000])
    cut_pt = tmp_path / "cut.pt"
    cut_pt.write_bytes(STLORA.read_bytes()[:5000])
    for name in ("empty.safetensors", "empty.pt"):
        (tmp_path / name).touch()
    for bad in (cut, cut_pt, tmp_path / "empty.safetensors", tmp_path / "empty.pt"):
        with pytest.raises(SliderError, match=f"{bad.name} cannot be read as an adapter"):
            read_adapter(bad)
    with pytest.raises(SliderError, match=r"absent\.pt no longer exists; expected an adapter"):
        read_adapter(tmp_path / "absent.pt")
    for content in ([1, 2], {}, torch.zeros(2), {"a": 1, "b": 2}):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(SliderError, match=r"odd\.pt"):
            read_adapter(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("transformer.transformer_blocks.0.attn.to_q.dora_scale", torch.ones(256, 1), "dora_scale.*Load LoRA"),
        (
            "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector",
            torch.ones(256),
            "cannot run as an unmerged LoRA",
        ),
        ("transformer.transformer_blocks.0.attn.to_q.lora_B.bias", torch.ones(256), "cannot run as an unmerged LoRA"),
        ("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a", torch.ones(2, 2), "LoHa"),
        ("diffusion_model.img_in.diff_b", torch.ones(256), "cannot run as an unmerged LoRA"),
        (
            "transformer.transformer_blocks.0.attn.to_z.lora_A.weight",
            torch.ones(4, 256),
            "not linears of a supported model",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
            torch.ones(4, 4),
            "not linears of a supported model",
        ),
        ("transformer.proj_out.lora_A.weight", torch.ones(4, 256), "only one of the two LoRA weights"),
    ],
)
def test_unsupported_tensors_are_rejected(peft, tmp_path, key, value, message):
    with pytest.raises(SliderError, match=message):
        read_adapter(save(tmp_path, peft | {key: value}))


def test_invalid_lora_weights_are_rejected(peft, tmp_path):
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    with pytest.raises(SliderError, match="shapes"):
        read_adapter(save(tmp_path, peft | {key: torch.ones(5, 256)}))
    with pytest.raises(SliderError, match="floating point"):
        read_adapter(save(tmp_path, peft | {key: torch.ones(4, 256, dtype=torch.int8)}))
    for bad_alpha in (torch.tensor(torch.nan), torch.zeros(0), torch.ones(2), torch.tensor(1j)):
        with pytest.raises(SliderError, match=r"alpha of .*expected one finite number"):
            read_adapter(save(tmp_path, peft | {key.replace("lora_A.weight", "alpha"): bad_alpha}))
    with pytest.raises(SliderError, match="not finite"):
        read_adapter(save(tmp_path, peft | {key: torch.full((4, 256), torch.inf)}))
    up = key.replace("lora_A", "lora_B")
    with pytest.raises(SliderError, match="shapes"):
        read_adapter(save(tmp_path, peft | {key: torch.ones(0, 256), up: torch.ones(256, 0)}))
    with pytest.raises(SliderError, match="twice"):
        read_adapter(save(tmp_path, peft | {key.replace("lora_A", "lora_down"): torch.ones(4, 256)}))
    torch.save({key: torch.ones(4, 256).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(SliderError, match="sparse"):
        read_adapter(tmp_path / "sparse.pt")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{broken", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"transformer.alpha_pattern": [1]}', "cannot be read"),
        ('{"transformer.lora_alpha": "8"}', "expected one finite number"),
        ('{"transformer.lora_alpha": NaN}', "expected one finite number"),
        ('{"transformer.lora_alpha": [1]}', "expected one finite number"),
        ('{"transformer.alpha_pattern": {"to_q": "x"}}', "expected one finite number"),
        ('{"transformer.alpha_pattern": {"(a+)+": 2}}', "expected names of linears"),
    ],
)
def test_invalid_headers_are_rejected(peft, tmp_path, header, message):
    with pytest.raises(SliderError, match=message):
        read_adapter(save(tmp_path, peft, {"lora_adapter_metadata": header}))


@pytest.mark.parametrize("alpha", [4, 8])
def test_float8_weights(peft, tmp_path, alpha):
    """float8 weights mixed with float16 ones give the same deltas as their float32 values."""
    stored = {k: v.to(torch.float8_e4m3fn) if "to_q" in k else v.half() for k, v in peft.items()}
    values = {k: v.float() for k, v in stored.items()}
    header = peft_header(r=4, lora_alpha=alpha)
    loaded, expected = weight_deltas(save(tmp_path, stored, header)), weight_deltas(save(tmp_path, values, header))
    assert all(torch.allclose(loaded[m].float(), expected[m], rtol=2e-2, atol=2e-2) for m in expected)


@pytest.mark.parametrize("lora_a_suffix", [".lora_A.default.weight", ".lora_A.my_adapter.weight", ".lora_down.weight"])
@pytest.mark.parametrize("prefix", ["transformer.", "unet.", "base_model.model.", "base_model.model.transformer."])
def test_prefixes_and_suffixes(peft, tmp_path, lora_a_suffix, prefix):
    lora_b_suffix = lora_a_suffix.replace("_A", "_B").replace("_down", "_up")
    tensors = {
        k.replace("transformer.", prefix, 1)
        .replace(".lora_A.weight", lora_a_suffix)
        .replace(".lora_B.weight", lora_b_suffix): v
        for k, v in peft.items()
    }
    assert same_deltas(weight_deltas(GSTLORA), weight_deltas(save(tmp_path, tensors)))


def test_adapter_for_another_model_is_rejected(peft, tmp_path, golden_model):
    wide = {k: torch.ones(v.shape[0] * (1 + ("_B" in k)), v.shape[1] * (1 + ("_A" in k))) for k, v in peft.items()}
    with pytest.raises(SliderError, match="hidden size 256"):
        apply_gstlora(golden_model, read_adapter(save(tmp_path, wide)), 0.5)
    up = "transformer.transformer_blocks.0.attn.add_k_proj.lora_B.weight"
    with pytest.raises(SliderError, match="does not fit the model"):
        apply_gstlora(golden_model, read_adapter(save(tmp_path, peft | {up: torch.ones(64, 4)})), 0.5)
    deep = peft | {k.replace("blocks.0.", "blocks.7."): v.clone() for k, v in peft.items()}
    with pytest.raises(SliderError, match=r"linears that this FLUX\.1 model does not have, such as \w+_blocks\.7"):
        apply_gstlora(golden_model, read_adapter(save(tmp_path, deep)), 0.5)
    with pytest.raises(SliderError, match=f"Use '{re.escape(names.APPLY_GSTLORA)}'"):
        apply_stlora(golden_model, read_adapter(GSTLORA))
    with pytest.raises(SliderError, match=f"Use '{re.escape(names.APPLY_STLORA)}'"):
        apply_gstlora(golden_model, read_adapter(STLORA), 0.5)


def test_runtime_that_ignores_patches_is_rejected(golden_model):
    class Engine(torch.nn.Module):
        pass

    foreign = golden_model.clone()
    foreign.model = type("Host", (), {"diffusion_model": Engine()})()
    with pytest.raises(SliderError, match="Engine, which ignores ComfyUI's patches"):
        apply_gstlora(foreign, read_adapter(GSTLORA), 0.5)
