"""mlx: bytes worked out by hand, MLX's numbers where it is installed, refusals, damage."""

from __future__ import annotations

import json

import pytest
import torch
from folders import foreign, quantized, same, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewbits.checkpoint import KINDS, Entry, open_checkpoint
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import FORMATS, Float, QTensor, format_named
from fewbits.formats.offset import Offset

KIND = KINDS["mlx"]
NORM = QTensor(Float(torch.float16), torch.ones(12).half(), {})
IDS = torch.arange(2, 66).view(1, 64)


def matrix(name, rows=6, columns=128, seed=0):
    return quantized(format_named(name), torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def configure(path, **changes):
    whole = json.loads((path / "config.json").read_text())
    whole["quantization"] |= changes
    (path / "config.json").write_text(json.dumps(whole))


def rewrite(path, remove=(), **arrays):
    file = path / "model.safetensors"
    kept = {name: a for name, a in load_file(file).items() if name not in remove}
    save_file(kept | arrays, file, {"format": "mlx"})


def test_bytes_worked_out_by_hand(tmp_path):
    """Code i of a 4-bit row is at bit 4·i; w = scale · q + bias."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).view(1, 32)
    q = QTensor(FORMATS["mlx4-g32"], codes, {"scale": torch.tensor([[0.5]]), "offset": torch.tensor([[-2.0]])})
    write(KIND, tmp_path / "out", {"m.weight": q, "norm.weight": NORM})
    arrays = load_file(tmp_path / "out/model.safetensors")
    assert {name: (a.dtype, tuple(a.shape)) for name, a in arrays.items()} == {
        "m.weight": (torch.uint32, (1, 4)),
        "m.scales": (torch.float16, (1, 1)),
        "m.biases": (torch.float16, (1, 1)),
        "norm.weight": (torch.float16, (12,)),
    }
    assert arrays["m.weight"].tolist() == [[0x76543210, 0xFEDCBA98] * 2]
    assert (arrays["m.scales"].item(), arrays["m.biases"].item()) == (0.5, -2.0)
    assert KIND.open(tmp_path / "out").read("m.weight").dequantize()[0, :5].tolist() == [-2.0, -1.5, -1.0, -0.5, 0.0]
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert found["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"} == found["quantization_config"]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "mlx"}


def test_three_bits_are_a_dense_stream(tmp_path):
    """Codes 1, 2, 3, …: bits 001 010 011 100 … from the lowest on."""
    codes = torch.arange(1, 33, dtype=torch.uint8).remainder(8).view(1, 32)
    q = QTensor(FORMATS["mlx3-g32"], codes, {"scale": torch.ones(1, 1), "offset": torch.zeros(1, 1)})
    write(KIND, tmp_path / "out", {"m.weight": q})
    stream = sum(int(code) << 3 * i for i, code in enumerate(codes[0]))
    words = [stream >> 32 * i & 0xFFFFFFFF for i in range(3)]
    assert load_file(tmp_path / "out/model.safetensors")["m.weight"].tolist() == [words]


MIXED = {"a.weight": "mlx4-g64", "b.weight": "mlx4-g64", "c.weight": "mlx6-g32", "d.weight": "mlx8-g128-bf16"}


def test_sizes_of_single_modules(tmp_path):
    tensors = {name: matrix(format) for name, format in MIXED.items()} | {"norm.weight": NORM}
    digests = write(KIND, tmp_path / "out", tensors, rows=2)
    sizes = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert sizes == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "c": {"group_size": 32, "bits": 6},
        "d": {"group_size": 128, "bits": 8},
    }
    kind, reader = open_checkpoint(tmp_path / "out")
    assert kind is KIND
    assert not {"quantization", "quantization_config"} & reader.config.keys()
    assert reader.entries == {n: Entry(n, q.shape, q.format) for n, q in tensors.items()}
    assert all(same(reader.read(n), q) for n, q in tensors.items())
    whole = tensors["c.weight"].dequantize()
    assert torch.equal(reader.read("c.weight", slice(1, 4)).dequantize(), whole[1:4])
    assert KIND.rehash(tmp_path / "out") == digests


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("suffix", ["", "-bf16", "-fp32"])
def test_the_library_reads_the_same(tmp_path, monkeypatch, bits, suffix):
    pytest.importorskip("mlx.core")
    monkeypatch.setattr("fewbits.checkpoint.mlx.FOREIGN_PART", 200)
    tensors = {"a.weight": matrix(f"mlx{bits}-g64{suffix}"), "norm.weight": NORM}
    write(KIND, tmp_path / "out", tensors)
    decoded = foreign(KIND, tmp_path / "out")
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[n], q.dequantize()) for n, q in tensors.items())


def test_which_formats_it_holds():
    held = {f.name for f in FORMATS.values() if KIND.admits(KIND.entry("m.weight", (32, 256), f)) is None}
    ours = {f"mlx{bits}-g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)}
    assert held == ours | {"fp32", "fp16", "bf16"}
    assert KIND.admits(KIND.entry("model.embed_tokens.weight", (32, 256), FORMATS["mlx4-g64"])) is None


@pytest.mark.parametrize(
    ("name", "shape", "format", "message"),
    [
        ("m.weight", (8, 64), Offset(bits=4, group=16), "such as mlx4-g64"),
        ("m.weight", (8, 64), FORMATS["int4-asym-g64"], "not int4-asym-g64"),
        ("m.weight", (8, 172), FORMATS["mlx4-g64"], "172 is not a multiple"),
        ("l.mlp.experts.3.up_proj.weight", (8, 64), FORMATS["mlx4-g64"], "stacks experts"),
        ("mlp.experts", (2, 8, 64), FORMATS["mlx4-g64"], "matrices named"),
    ],
)
def test_refusals(tmp_path, name, shape, format, message):
    entry = Entry(name, shape, format)
    assert message in KIND.admits(entry)
    with pytest.raises(UnsupportedError, match=message):
        KIND.create(tmp_path / "out", [entry], tmp_path, {})


def test_a_group_of_equal_weights_and_zeros_are_exact():
    w = torch.tensor([[0.25] * 64, [0.0] * 64, [-1.0, 0.0, 0.5, 2.0] * 16])
    for bits in (2, 4, 8):
        found = quantized(FORMATS[f"mlx{bits}-g64"], w).dequantize()
        assert torch.equal(found[:2], w[:2])
        assert float(found[2, 1].abs()) < 2e-3


@pytest.fixture
def folder(tmp_path):
    write(KIND, tmp_path / "out", {"a.weight": matrix("mlx4-g64"), "norm.weight": NORM})
    return tmp_path / "out"


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8", None, 3])
def test_other_modes_are_refused(folder, mode):
    configure(folder, mode=mode)
    with pytest.raises(CheckpointError, match="fewbits reads affine only"):
        KIND.open(folder)
    configure(folder, mode="affine", a={"mode": "mxfp4", "bits": 4, "group_size": 32})
    with pytest.raises(CheckpointError, match="'a' is in MLX's mode 'mxfp4'"):
        KIND.open(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "but 8 bits in groups of 64, as config.json says"),
        ({"group_size": 32}, "but 4 bits in groups of 32"),
        ({"bits": 7}, "bits 7"),
        ({"bits": True}, "bits True"),
        ({"group_size": "64"}, "group_size '64'"),
        ({"a": {"bits": 3}}, "but 3 bits in groups of 64"),
    ],
)
def test_a_configuration_that_disagrees_is_named(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a.weight": torch.zeros(6, 15, dtype=torch.uint32)}, "make torch.uint32"),
        ({"a.weight": torch.zeros(6, 16)}, "make torch.uint32"),
        ({"a.biases": torch.zeros(6, 2)}, "make torch.float16"),
        ({"a.scales": torch.zeros(6, 2, dtype=torch.int32)}, "must be floating point"),
        ({"a.scales": torch.zeros(0, 2)}, "must be floating point"),
        ({"a.scales": torch.full((6, 2), float("nan")).half()}, "'scales' of 'a.weight' are NaN"),
        ({"b.scales": torch.zeros(6, 2)}, "'b.weight' is missing"),
        ({"b.weight": torch.zeros(6, 16, dtype=torch.uint32)}, "'b.scales' is missing"),
    ],
)
def test_damage_is_named(folder, arrays, message):
    rewrite(folder, **arrays)
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder).read("a.weight")


def test_nothing_quantized(folder):
    """As mlx-lm writes a model whose widths no group divides, and loads it."""
    rewrite(folder, remove=["a.weight", "a.scales", "a.biases"])
    kind, reader = open_checkpoint(folder)
    assert kind is KIND
    assert all(isinstance(entry.format, Float) for entry in reader.entries.values())


JUNK = st.sampled_from([None, -1, 0, 3.5, 10**30, True, "x", "affine", [], [[]], {}, {"bits": 8}, 64])


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(["bits", "group_size", "mode", "a", "quant_method"]), JUNK))
def test_damaged_configurations_raise_nothing_else(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("f") / "out"
    write(KIND, path, {"a.weight": matrix("mlx4-g64")})
    configure(path, **changes)
    try:
        reader = open_checkpoint(path)[1]
        for name in reader.entries:
            reader.read(name).dequantize()
    except CheckpointError:
        pass
