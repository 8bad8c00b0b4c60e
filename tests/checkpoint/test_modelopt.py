"""modelopt: NVFP4 is read as NVIDIA's own decoder orders its roundings."""

from __future__ import annotations

import json

import pytest
import torch
from folders import same
from safetensors.torch import save_file
from tiny import save_model

import fewbits
from fewbits.checkpoint import KINDS, Entry, open_checkpoint
from fewbits.checkpoint.modelopt import FORMAT
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import FORMATS, QTensor

KIND = KINDS["modelopt"]
SAID = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
BESIDE = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "model.layers.1.*"]},
}


def layer(rows=4, columns=64, seed=0, name="m"):
    g = torch.Generator().manual_seed(seed)
    scale = torch.randint(8, 0x7F, (rows, columns // 16), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return {
        f"{name}.weight": torch.randint(256, (rows, columns // 2), generator=g, dtype=torch.uint8),
        f"{name}.weight_scale": scale,
        f"{name}.weight_scale_2": torch.tensor(0.01 / 3),
        f"{name}.input_scale": torch.tensor(0.5),
    }


def folder_of(path, arrays, said=SAID, beside=BESIDE, **config):
    path.mkdir(parents=True, exist_ok=True)
    save_file(arrays | {"norm.weight": torch.ones(4)}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | ({} if said is None else {"quantization_config": said})))
    if beside is not None:
        (path / "hf_quant_config.json").write_text(json.dumps(beside))
    return path


def test_bytes_worked_out_by_hand(tmp_path, caplog):
    """0x52: code 2 first, 1.0, then 5, 3.0; 0x9F: −6, then −0.5. E4M3 0x40 is 2, 0x30 0.5; the factor 0.25."""
    packed = torch.zeros(1, 16, dtype=torch.uint8)
    packed[0, [0, 1, 15]] = torch.tensor([0x52, 0x9F, 0x70], dtype=torch.uint8)
    arrays = {
        "m.weight": packed,
        "m.weight_scale": torch.tensor([[0x40, 0x30]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        "m.weight_scale_2": torch.tensor(0.25),
        "m.input_scale": torch.tensor(1.0),
    }
    kind, reader = open_checkpoint(folder_of(tmp_path / "x", arrays))
    assert kind is KIND
    assert reader.entries.keys() == {"m.weight", "norm.weight"}
    assert reader.entries["m.weight"] == Entry("m.weight", (1, 32), FORMAT)
    w = reader.read("m.weight").dequantize()
    assert w[0, [0, 1, 2, 3, 4, 30, 31]].tolist() == [0.5, 1.5, -3.0, -0.25, 0.0, 0.0, 0.75]
    assert "inputs and caches stay in floating point, 1 scales" in caplog.text


def test_scales_times_the_factor_first(tmp_path):
    """As modelopt's NVFP4QTensor.dequantize; the other order gives other last bits."""
    arrays = layer(64, 128)
    found = KIND.open(folder_of(tmp_path / "x", arrays)).read("m.weight").dequantize()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([arrays["m.weight"] & 15, arrays["m.weight"] >> 4], -1).flatten(-2).long()
    v = table[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    scale = arrays["m.weight_scale"].float().repeat_interleave(16, -1)
    factor = arrays["m.weight_scale_2"]
    assert torch.equal(found, v * (scale * factor))
    assert not torch.equal(found, v * scale * factor)
    assert not torch.equal(found, v * (scale / (1 / factor)))


def test_compressed_tensors_converter_agrees_but_for_the_reciprocal(tmp_path):
    """Its converter stores 1 / weight_scale_2 and divides, which rounds three times: 2^−22 at most."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

    arrays = layer(64, 128)
    found = KIND.open(folder_of(tmp_path / "x", arrays)).read("m.weight").dequantize()
    converted = dict(arrays)
    ModelOptNvfp4Converter(targets=["re:m$"]).process(converted)
    values = unpack_fp4_from_uint8(converted["m.weight_packed"], 64, 128, dtype=torch.float32)
    scale = converted["m.weight_scale"].float() / converted["m.weight_global_scale"]
    assert torch.allclose(found, values * scale.repeat_interleave(16, -1), rtol=2**-22, atol=0)


def test_modelopt_itself(tmp_path):
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    q, scale, factor = qtensor.NVFP4QTensor.quantize(w, 16)
    arrays = {"m.weight": q._quantized_data, "m.weight_scale": scale, "m.weight_scale_2": factor}
    found = KIND.open(folder_of(tmp_path / "x", arrays)).read("m.weight").dequantize()
    assert torch.equal(found, q.dequantize(scale=scale, double_scale=factor, block_sizes={-1: 16}))


def test_the_format_is_nvfp4_but_for_the_factor():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    q = QTensor(FORMAT, FORMAT.round(w, params := FORMAT.fit(w, search=True)), params)
    other = FORMATS["nvfp4"]
    expected = other.decode(other.round(w, found := other.fit(w, search=True)), found)
    assert torch.allclose(q.dequantize(), expected, rtol=2**-21, atol=0)
    assert same(QTensor.from_arrays(FORMAT, q.pack(), q.shape), q)
    assert sum(array.nbytes for array in q.pack().values()) == q.nbytes == other.nbytes((8, 64))
    lookup = FORMAT.lookup(q.pack(), (8, 64))
    low, high = lookup.codes & 15, lookup.codes >> 4
    levels = lookup.levels[torch.stack([low, high], -1).flatten(-2).int()]
    assert torch.equal(levels * lookup.scale.repeat_interleave(16, -1), q.dequantize())


@pytest.mark.parametrize(("said", "beside"), [(SAID, None), (None, BESIDE)])
def test_either_file_is_enough(tmp_path, said, beside):
    kind, reader = open_checkpoint(folder_of(tmp_path / "x", layer(), said, beside))
    assert kind is KIND
    assert reader.entries["m.weight"].format == FORMAT


def test_a_model_runs_on_these_weights(tmp_path):
    save_model(tmp_path / "source", "llama")
    source = fewbits.load(tmp_path / "source")
    arrays, expected = {}, {}
    for name, w in source.state_dict().items():
        if name.endswith("proj.weight"):
            params = FORMAT.fit(w)
            q = QTensor(FORMAT, FORMAT.round(w, params), params)
            parts = q.pack()
            arrays |= {name: parts["packed"], f"{name}_scale": parts["scale"], f"{name}_scale_2": parts["factor"][0, 0]}
            expected[name] = q.dequantize()
        else:
            arrays[name] = w
    config = json.loads((tmp_path / "source/config.json").read_text())
    folder = folder_of(tmp_path / "x", arrays, {**SAID}, None, **config)
    save_file(arrays, folder / "model.safetensors")
    source.load_state_dict(expected, strict=False)
    ids = torch.arange(2, 34).view(1, 32)
    with torch.inference_mode():
        ours, theirs = fewbits.load(folder)(ids).logits, source(ids).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize(
    ("arrays", "said", "beside", "message"),
    [
        ({}, SAID | {"quant_algo": "FP8"}, BESIDE, "config.json: quant_algo is 'FP8' in groups of 16"),
        (
            {},
            SAID,
            BESIDE | {"quantization": {"quant_algo": "W4A8_AWQ"}},
            "hf_quant_config.json: quant_algo is 'W4A8_AWQ'",
        ),
        ({}, SAID | {"group_size": 32}, None, "in groups of 32"),
        (
            {},
            SAID | {"ignore": ["m*"]},
            None,
            r"config.json says that 'm\*' is not quantized, but 'm.weight_scale_2' is",
        ),
        ({}, SAID | {"ignore": [1]}, None, "must be a list of names"),
        (
            {"m.weight_scale": torch.ones(4, 2).to(torch.float8_e4m3fn)},
            SAID,
            None,
            r"float8_e4m3fn \[4, 2\] and a factor",
        ),
        ({"m.weight_scale_2": torch.ones(4)}, SAID, None, r"a factor torch.float32 \[4\]"),
        ({"m.weight_scale_2": torch.tensor(float("nan"))}, SAID, None, "are NaN or Inf"),
        ({"m.weight": torch.ones(4, 64)}, SAID, None, "is torch.float32"),
        ({"b.weight": torch.ones(4, 32, dtype=torch.uint8)}, SAID, None, "'b.weight' is packed, but"),
        ({"b.weight_scale_2": torch.ones(())}, SAID, None, "'b.weight' is missing"),
    ],
)
def test_damage_is_named(tmp_path, arrays, said, beside, message):
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder_of(tmp_path / "x", layer() | arrays, said, beside)).read("m.weight")


def test_no_quantized_tensors_and_writing(tmp_path):
    with pytest.raises(CheckpointError, match="says NVFP4, but no tensor is named"):
        KIND.open(folder_of(tmp_path / "x", {}))
    with pytest.raises(CheckpointError, match="read it whole"):
        KIND.open(folder_of(tmp_path / "y", layer())).read("m.weight", slice(0, 1))
    assert "writes none" in KIND.admits(Entry("m.weight", (4, 64), FORMAT))
    with pytest.raises(UnsupportedError, match="writes none"):
        KIND.create(tmp_path / "out", [], tmp_path, {})
