"""fp8: what transformers quantizes is read to its numbers, and what we write it loads and runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from folders import foreign, quantized, same, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_model
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Linear, Fp8Quantize

import fewbits
from fewbits.checkpoint import KINDS, Entry, open_checkpoint
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import FORMATS, Float, QTensor
from fewbits.formats.minifloat import Fp8

KIND = KINDS["fp8"]
NORM = QTensor(Float(torch.float16), torch.ones(12).half(), {})
IDS = torch.arange(2, 66).view(1, 64)
CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def folder_of(path, arrays, **changes):
    path.mkdir(exist_ok=True)
    save_file(arrays | {"norm.weight": torch.ones(12)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": CONFIG | changes}))
    return path


def codes(rows, columns):
    return random(rows, columns).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128)])
def test_what_transformers_quantizes_is_read_to_its_numbers(tmp_path, scale_fmt, block):
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    made = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("a.weight", random(256, 384))
    folder = folder_of(tmp_path / "x", made, weight_block_size=list(block), scale_fmt=scale_fmt)
    reader = KIND.open(folder)
    assert reader.entries["a.weight"].format == Fp8(rows=block[0], group=block[1])
    scale = made["a.weight_scale_inv"].float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    found = reader.read("a.weight")
    assert torch.equal(found.dequantize(), made["a.weight"].float() * scale)
    assert torch.equal(foreign(KIND, folder)["a.weight"], found.dequantize())


def test_our_rounding_is_transformers(tmp_path):
    """Without a search: their scale is 1 / (448 / max), ours max / 448, the same but for a rounding."""
    w = random(256, 128)
    made = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config()))._quantize_one("a.weight", w)
    ours = quantized(FORMATS["fp8-e4m3-b128"], w).pack()
    assert torch.allclose(ours["scale"], made["a.weight_scale_inv"], rtol=2**-22)
    assert float((ours["weight"].float() != made["a.weight"].float()).float().mean()) < 1e-3


def test_ragged_blocks_are_of_the_configured_size(tmp_path):
    """As DeepSeek's kv_a_proj has them: 130 rows of 200 columns are 2 × 2 blocks."""
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    reader = KIND.open(folder_of(tmp_path / "x", {"a.weight": codes(130, 200), "a.weight_scale_inv": scale}))
    factor = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :200]
    assert torch.equal(reader.read("a.weight").dequantize(), codes(130, 200).float() * factor)


@pytest.mark.parametrize("block", [(2**31 - 1, 128), (128, 2**31 - 1), (2**31 - 1, 2**31 - 1)])
def test_a_block_larger_than_the_matrix_takes_no_room(tmp_path, block):
    """A number in config.json must not decide about memory."""
    arrays = {"a.weight": codes(100, 100), "a.weight_scale_inv": torch.full((1, 1), 2.0)}
    folder = folder_of(tmp_path / "x", arrays, weight_block_size=list(block))
    found = KIND.open(folder).read("a.weight")
    assert found.params["scale"].shape == (100, 1)
    assert torch.equal(found.dequantize(), codes(100, 100).float() * 2)
    assert found.format.grouped(found.codes).numel() <= 100 * 1024


def test_bytes_worked_out_by_hand(tmp_path):
    """0.5 is 0x30 in E4M3 and −448 0xFE; a scale for each block."""
    q = QTensor(
        FORMATS["fp8-e4m3-b128"],
        torch.full((128, 256), 0x30, dtype=torch.uint8).index_fill(1, torch.tensor([255]), 0xFE),
        {"scale": torch.tensor([[2.0, 0.25]]).repeat(128, 1)},
    )
    write(KIND, tmp_path / "out", {"m.weight": q, "norm.weight": NORM})
    arrays = load_file(tmp_path / "out/model.safetensors")
    assert (arrays["m.weight"].dtype, tuple(arrays["m.weight"].shape)) == (torch.float8_e4m3fn, (128, 256))
    assert arrays["m.weight"].view(torch.uint8)[5, [0, 255]].tolist() == [0x30, 0xFE]
    assert arrays["m.weight_scale_inv"].tolist() == [[2.0, 0.25]]
    assert KIND.open(tmp_path / "out").read("m.weight").dequantize()[7, [0, 128, 255]].tolist() == [1.0, 0.125, -112.0]
    found = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert found == CONFIG | {"modules_to_not_convert": ["lm_head", "decoder"]}


def test_our_reader_gives_everything_back(tmp_path):
    tensors = {"a.weight": quantized(FORMATS["fp8-e4m3-b128"], random(256, 128)), "norm.weight": NORM}
    digests = write(KIND, tmp_path / "out", tensors)
    kind, reader = open_checkpoint(tmp_path / "out")
    assert kind is KIND
    assert "quantization_config" not in reader.config
    assert reader.entries == {n: Entry(n, q.shape, q.format) for n, q in tensors.items()}
    assert all(same(reader.read(n), q) for n, q in tensors.items())
    assert KIND.rehash(tmp_path / "out") == digests
    with pytest.raises(CheckpointError, match="read it whole"):
        reader.read("a.weight", slice(0, 2))


def test_one_scale_a_matrix_is_written_as_transformers_layers_hold_it(tmp_path):
    q = quantized(FORMATS["fp8-e4m3-tensor"], random(100, 60))
    write(KIND, tmp_path / "out", {"a.weight": q})
    layer = FP8Linear(60, 100, block_size=None)
    layer.load_state_dict(
        {n.removeprefix("a."): array for n, array in load_file(tmp_path / "out/model.safetensors").items()}
    )
    assert torch.equal(layer.weight.float() * layer.weight_scale_inv, q.dequantize())
    found = KIND.open(tmp_path / "out").read("a.weight")
    assert found.format == q.format
    assert torch.equal(found.dequantize(), q.dequantize())


def test_one_size_of_blocks_for_all_layers(tmp_path):
    formats = (FORMATS["fp8-e4m3-tensor"], FORMATS["fp8-e4m3-b128"])
    entries = [Entry(f"{i}.weight", (128, 128), format) for i, format in enumerate(formats)]
    with pytest.raises(UnsupportedError, match="one weight_block_size for all layers"):
        KIND.create(tmp_path / "out", entries, tmp_path, {})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_a_matrix(tmp_path, shape):
    arrays = {"a.weight": codes(100, 60), "a.weight_scale_inv": torch.full(shape, 0.5)}
    folder = folder_of(tmp_path / "x", arrays, weight_block_size=None)
    found = KIND.open(folder).read("a.weight")
    assert found.format == FORMATS["fp8-e4m3-tensor"]
    assert torch.equal(found.dequantize(), codes(100, 60).float() * 0.5)
    assert torch.equal(foreign(KIND, folder)["a.weight"], found.dequantize())


def test_which_formats_it_holds():
    held = {f.name for f in FORMATS.values() if KIND.admits(KIND.entry("m.weight", (256, 256), f)) is None}
    assert held == {"fp8-e4m3-b128", "fp8-e4m3-tensor", "fp32", "fp16", "bf16"}
    assert KIND.file_bytes(FORMATS["fp8-e4m3-tensor"], (256, 256)) == 256 * 256 + 4


@pytest.mark.parametrize(
    ("name", "shape", "format", "message"),
    [
        ("m.weight", (128, 128), "fp8-e4m3", "not fp8-e4m3; choose"),
        ("m.weight", (130, 128), "fp8-e4m3-b128", "whole blocks of 128×128"),
        ("model.embed_tokens.weight", (128, 128), "fp8-e4m3-b128", "linear layers"),
    ],
)
def test_refusals(tmp_path, name, shape, format, message):
    entry = Entry(name, shape, FORMATS[format])
    assert message in KIND.admits(entry)
    with pytest.raises(UnsupportedError, match=message):
        KIND.create(tmp_path / "out", [entry], tmp_path, {})


@pytest.mark.parametrize(("format", "ffn"), [("fp8-e4m3-b128", 256), ("fp8-e4m3-tensor", 172)])
def test_transformers_loads_it_and_predicts_the_same(tmp_path, format, ffn):
    save_model(tmp_path / "source", "llama", hidden_size=128, intermediate_size=ffn, num_key_value_heads=4)
    made = fewbits.quantize(tmp_path / "source", tmp_path / "out", format=format, kind="fp8")
    assert made.verified_with == "transformers"
    assert sum(t.format == format for t in made.tensors) > 4
    config = FineGrainedFP8Config.from_dict(
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] | {"dequantize": True}
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=config)
    with torch.inference_mode():
        expected, ours = theirs(IDS).logits, fewbits.load(tmp_path / "out")(IDS).logits
    assert float((ours - expected).norm() / expected.norm()) < 1e-5
    found = fewbits.verify(tmp_path / "out", tmp_path / "source")
    assert found.passed
    assert found.stack.startswith("transformers")


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({"a.weight_scale_inv": torch.ones(2, 1)}, {}, r"weight_block_size \[128, 128\] in config.json makes \[1, 1\]"),
        ({"a.weight_scale_inv": torch.ones(1, 1).int()}, {}, "is torch.int32"),
        ({"a.weight_scale_inv": torch.full((1, 1), float("inf"))}, {}, "holds NaN or Inf"),
        ({"a.weight": torch.ones(128, 128)}, {}, "must be a matrix of float8_e4m3fn"),
        ({}, {"weight_block_size": [64, 64]}, r"makes \[2, 2\]"),
        ({}, {"weight_block_size": None}, "weight_block_size None|makes"),
        ({}, {"weight_block_size": [0, 128]}, "must be .rows, columns. or null"),
        ({}, {"weight_block_size": 128}, "must be .rows, columns. or null"),
        ({"b.weight": codes(4, 4)}, {}, "'b.weight_scale_inv' is missing"),
        ({"b.weight_scale_inv": torch.ones(1, 1)}, {}, "'b.weight' is missing"),
        ({"mlp.experts.down_proj_scale_inv": torch.ones(2, 1, 1)}, {}, "experts fused into one tensor"),
    ],
)
def test_damage_is_named(tmp_path, arrays, changes, message):
    sound = {"a.weight": codes(128, 128), "a.weight_scale_inv": torch.ones(1, 1)}
    folder = folder_of(tmp_path / "x", sound | arrays, **changes)
    if changes == {"weight_block_size": None}:  # one scale of one block is one scale of the matrix
        assert KIND.open(folder).entries["a.weight"].format == FORMATS["fp8-e4m3-tensor"]
        return
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder).read("a.weight")


def test_static_scales_are_left_out_with_a_warning(tmp_path, caplog):
    arrays = {"a.weight": codes(128, 128), "a.weight_scale_inv": torch.ones(1, 1), "a.activation_scale": torch.ones(())}
    reader = KIND.open(folder_of(tmp_path / "x", arrays, activation_scheme="static"))
    assert reader.entries.keys() == {"a.weight", "norm.weight"}
    assert "static scales" in caplog.text


JUNK = st.sampled_from([None, -1, 0, 3.5, 10**30, True, "x", "static", [], [[]], {}, {"a": 1}, [1, 2], [128, 128, 1]])


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(list(CONFIG)), JUNK), data=st.binary(min_size=64, max_size=64))
def test_damaged_configurations_raise_nothing_else(tmp_path_factory, changes, data):
    weight = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(torch.float8_e4m3fn).view(8, 8)
    arrays = {"a.weight": weight, "a.weight_scale_inv": torch.ones(1, 1)}
    folder = folder_of(tmp_path_factory.mktemp("f") / "x", arrays, **changes)
    try:
        reader = open_checkpoint(folder)[1]
        for name in reader.entries:
            reader.read(name).dequantize()
    except CheckpointError:
        pass
