"""Adapters in every format give the same numbers; what cannot work is refused with a reason."""

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


def deltas(path) -> dict[str, torch.Tensor]:
    """Each target's whole weight change as the adapter's side paths compute it (strength 0)."""
    out = {}
    side = read_adapter(path).lora_branches
    for name, path_module in zip(side.paths, side.branches):
        width = path_module.down.weight.shape[1]
        rows = max(r.stop for r in path_module.features)
        out[name] = path_module(torch.zeros(width, rows), torch.eye(width), torch.tensor(1.0)).T
    return out


def same(a: dict, b: dict, factor: float = 1.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k] * factor, b[k], atol=1e-5) for k in a)


def saved(tmp_path, tensors: dict, metadata: dict | None = None):
    path = tmp_path / "adapter.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def peft_header(**declared) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in declared.items()})}


def renamed(peft: dict, rename) -> dict:
    return {rename(k): v for k, v in peft.items()}


def underscored(prefix: str):
    def rename(key: str) -> str:
        module, _, kind = key.removeprefix("transformer.").rpartition(".lora_")
        return prefix + module.replace(".", "_") + (".lora_down.weight" if kind == "A.weight" else ".lora_up.weight")

    return rename


NAMES = {
    "no prefix": lambda k: k.removeprefix("transformer."),
    "diffusion_model": lambda k: k.replace("transformer.", "diffusion_model.", 1),
    "base_model": lambda k: k.replace("transformer.", "base_model.model.", 1),
    "default adapter": lambda k: k.replace(".weight", ".default.weight"),
    "old diffusers": lambda k: k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."),
    "kohya": underscored("lora_unet_"),
    "onetrainer": underscored("lora_transformer_"),
    "lycoris": underscored("lycoris_"),
}


@pytest.mark.parametrize("names", NAMES)
def test_names(peft, tmp_path, names):
    path = saved(tmp_path, renamed(peft, NAMES[names]))
    assert same(deltas(GSTLORA), deltas(path))
    assert read_adapter(path).adapter_type == "GSTLoRA"


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
def test_fused_comfyui_names(peft, tmp_path, prefix):
    want = deltas(GSTLORA)
    fused = {}
    for module, delta in want.items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        name = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        if module.endswith("linear1"):
            name += "_qkv"
        rank = 3 * RANK
        fused[f"{name}.lora_down.weight"] = v[:rank]
        fused[f"{name}.lora_up.weight"] = u[:, :rank] * s[:rank]
        fused[f"{name}.alpha"] = torch.tensor(float(rank))
    assert same(want, deltas(saved(tmp_path, fused)))


def test_alpha_tensor(peft, tmp_path):
    alphas = {k.replace(".lora_A.weight", ".alpha"): torch.tensor(2.0) for k in peft if ".lora_A." in k}
    assert same(deltas(GSTLORA), deltas(saved(tmp_path, peft | alphas)), 2.0 / RANK)


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
    found, want = deltas(saved(tmp_path, peft, peft_header(**declared))), deltas(GSTLORA)
    if factor is not None:
        assert same(want, found, factor)
        return
    for module in want:
        halved = want[module].clone()
        if module.endswith(("img_attn.qkv", "linear1")):
            halved[: 2 * HIDDEN] /= 2
        assert torch.allclose(found[module], halved, atol=1e-5), module


def test_recognised(golden_model):
    st, gst = read_adapter(STLORA), read_adapter(GSTLORA)
    assert (st.adapter_type, st.ranks, st.family.name) == ("STLoRA", [4], "FLUX.1")
    assert (gst.adapter_type, gst.ranks, gst.family.name) == ("GSTLoRA", [4], "FLUX.1")
    text = st.describe()
    for part in ("STLoRA", "FLUX.1", "rank: 4", "double_blocks 0-2", "txt_attn.qkv (q, k, v)", "txt_mlp.2"):
        assert part in text
    assert "single_blocks" not in text
    assert "linear1 (q, k, v)" in gst.describe()
    assert family_of(golden_model) is st.family


def test_reading_twice_shares_nothing_writable(golden_model):
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


def test_hostile_pickle(tmp_path):
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
            "not layers of a supported model",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
            torch.ones(4, 4),
            "not layers of a supported model",
        ),
        ("transformer.proj_out.lora_A.weight", torch.ones(4, 256), "only one of the two LoRA weights"),
    ],
)
def test_refused_parts(peft, tmp_path, key, value, message):
    with pytest.raises(SliderError, match=message):
        read_adapter(saved(tmp_path, peft | {key: value}))


def test_refused_factors(peft, tmp_path):
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    with pytest.raises(SliderError, match="shapes"):
        read_adapter(saved(tmp_path, peft | {key: torch.ones(5, 256)}))
    with pytest.raises(SliderError, match="floating point"):
        read_adapter(saved(tmp_path, peft | {key: torch.ones(4, 256, dtype=torch.int8)}))
    for odd in (torch.tensor(torch.nan), torch.zeros(0), torch.ones(2), torch.tensor(1j)):
        with pytest.raises(SliderError, match=r"alpha of .*expected one finite number"):
            read_adapter(saved(tmp_path, peft | {key.replace("lora_A.weight", "alpha"): odd}))
    with pytest.raises(SliderError, match="not finite"):
        read_adapter(saved(tmp_path, peft | {key: torch.full((4, 256), torch.inf)}))
    up = key.replace("lora_A", "lora_B")
    with pytest.raises(SliderError, match="shapes"):
        read_adapter(saved(tmp_path, peft | {key: torch.ones(0, 256), up: torch.ones(256, 0)}))
    with pytest.raises(SliderError, match="twice"):
        read_adapter(saved(tmp_path, peft | {key.replace("lora_A", "lora_down"): torch.ones(4, 256)}))
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
        ('{"transformer.alpha_pattern": {"(a+)+": 2}}', "expected names of layers"),
    ],
)
def test_refused_headers(peft, tmp_path, header, message):
    with pytest.raises(SliderError, match=message):
        read_adapter(saved(tmp_path, peft, {"lora_adapter_metadata": header}))


@pytest.mark.parametrize("alpha", [4, 8])
def test_eight_bit_factors(peft, tmp_path, alpha):
    """Stored in 8 bits, alone or beside 16-bit ones: the same as their values."""
    stored = {k: v.to(torch.float8_e4m3fn) if "to_q" in k else v.half() for k, v in peft.items()}
    values = {k: v.float() for k, v in stored.items()}
    header = peft_header(r=4, lora_alpha=alpha)
    found, want = deltas(saved(tmp_path, stored, header)), deltas(saved(tmp_path, values, header))
    assert all(torch.allclose(found[m].float(), want[m], rtol=2e-2, atol=2e-2) for m in want)


@pytest.mark.parametrize("spelling", [".lora_A.default.weight", ".lora_A.my_adapter.weight", ".lora_down.weight"])
@pytest.mark.parametrize("prefix", ["transformer.", "unet.", "base_model.model.", "base_model.model.transformer."])
def test_spellings(peft, tmp_path, spelling, prefix):
    other = spelling.replace("_A", "_B").replace("_down", "_up")
    renamed = {
        k.replace("transformer.", prefix, 1).replace(".lora_A.weight", spelling).replace(".lora_B.weight", other): v
        for k, v in peft.items()
    }
    assert same(deltas(GSTLORA), deltas(saved(tmp_path, renamed)))


def test_models_that_do_not_fit(peft, tmp_path, golden_model):
    wide = {k: torch.ones(v.shape[0] * (1 + ("_B" in k)), v.shape[1] * (1 + ("_A" in k))) for k, v in peft.items()}
    with pytest.raises(SliderError, match="hidden size 256"):
        apply_gstlora(golden_model, read_adapter(saved(tmp_path, wide)), 0.5)
    up = "transformer.transformer_blocks.0.attn.add_k_proj.lora_B.weight"
    with pytest.raises(SliderError, match="does not fit the model"):
        apply_gstlora(golden_model, read_adapter(saved(tmp_path, peft | {up: torch.ones(64, 4)})), 0.5)
    deep = peft | {k.replace("blocks.0.", "blocks.7."): v.clone() for k, v in peft.items()}
    with pytest.raises(SliderError, match=r"layers that this FLUX\.1 model does not have, such as \w+_blocks\.7"):
        apply_gstlora(golden_model, read_adapter(saved(tmp_path, deep)), 0.5)
    with pytest.raises(SliderError, match=f"Use '{re.escape(names.APPLY_GSTLORA)}'"):
        apply_stlora(golden_model, read_adapter(GSTLORA))
    with pytest.raises(SliderError, match=f"Use '{re.escape(names.APPLY_STLORA)}'"):
        apply_gstlora(golden_model, read_adapter(STLORA), 0.5)


def test_runtimes_that_ignore_patches(golden_model):
    class Engine(torch.nn.Module):
        pass

    foreign = golden_model.clone()
    foreign.model = type("Host", (), {"diffusion_model": Engine()})()
    with pytest.raises(SliderError, match="Engine, which ignores ComfyUI's patches"):
        apply_gstlora(foreign, read_adapter(GSTLORA), 0.5)
