"""awq: nibbles lie in the order of AutoAWQ's GEMM kernels, and nothing it writes is read otherwise."""

from __future__ import annotations

import json
import re
from contextlib import suppress

import pytest
import torch
from folders import foreign, quantized, rows_of, same, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_model

import fewbits
from fewbits.checkpoint import KINDS, Entry, awq, open_checkpoint
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ACTIVATIONS, FORMATS, Affine, Float, QTensor

KIND = KINDS["awq"]
NORM = QTensor(Float(torch.float16), torch.ones(12).half(), {})
I32 = torch.int32


def matrix(group=16, shape=(32, 64), seed=0, scales=torch.float16):
    """Codes and zero-points of every value, scales of 16 bits."""
    format, draw = Affine(bits=4, symmetric=False, group=group, group_scale=scales), torch.Generator().manual_seed(seed)
    groups = format.groups(shape)
    scale = torch.randn(groups, generator=draw).to(scales).float()
    zero = torch.randint(16, groups, generator=draw).float()
    return QTensor(format, torch.randint(16, shape, generator=draw).to(torch.uint8), {"scale": scale, "zero": zero})


def configuration(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def configure(path, **changes):
    whole = json.loads((path / "config.json").read_text())
    whole["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(whole))


def rewrite(path, without=(), **arrays):
    file = path / "model.safetensors"
    kept = {name: array for name, array in load_file(file).items() if name not in without}
    save_file(kept | {name.replace("__", "."): array for name, array in arrays.items()}, file, {"format": "pt"})


def test_bytes_worked_out_by_hand(tmp_path):
    """Output n of every input has code n, so a word's nibbles, from the lowest, are 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = torch.arange(8, dtype=torch.uint8).view(8, 1).expand(8, 16).contiguous()
    params = {"scale": torch.arange(1.0, 9.0).view(8, 1), "zero": torch.arange(8.0, 16.0).view(8, 1)}
    q = QTensor(FORMATS["int4-asym-g16"], codes, params)
    write(KIND, tmp_path / "out", {"m.weight": q, "norm.weight": NORM})
    arrays = load_file(tmp_path / "out/model.safetensors")
    assert {name: (a.dtype, tuple(a.shape)) for name, a in arrays.items()} == {
        "m.qweight": (I32, (16, 1)),
        "m.qzeros": (I32, (1, 1)),
        "m.scales": (torch.float16, (1, 8)),
        "norm.weight": (torch.float16, (12,)),
    }
    assert arrays["m.qweight"].flatten().tolist() == 16 * [0x75316420]
    assert int(arrays["m.qzeros"]) & 0xFFFFFFFF == 0xFDB9ECA8
    assert arrays["m.scales"][0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert configuration(tmp_path / "out") == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 16,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head", "lm_head.decoder", "cls.predictions.decoder"],
    }


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), words=st.integers(1, 9), seed=st.integers(0, 2**31), data=st.data())
def test_packing_comes_back_in_parts(rows, words, seed, data):
    codes = torch.randint(16, (rows, 8 * words), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    start, stop = sorted((data.draw(st.integers(0, 8 * words)), data.draw(st.integers(0, 8 * words))))
    packed = awq.pack(codes)
    assert torch.equal(awq.unpack(packed, range(8 * words)), codes)
    assert torch.equal(awq.unpack(packed, range(start, stop)), codes[:, start:stop])


@pytest.mark.parametrize(("group", "scales"), [(16, torch.float16), (64, torch.bfloat16), ("row", torch.float16)])
def test_everything_comes_back(tmp_path, group, scales):
    tensors = {"a.weight": matrix(group, (96, 128), scales=scales), "norm.weight": NORM}
    digests = write(KIND, tmp_path / "out", tensors, rows=7)
    found, reader = open_checkpoint(tmp_path / "out")
    assert found is KIND
    assert "quantization_config" not in reader.config
    assert {n: (e.shape, e.format.name) for n, e in reader.entries.items()} == {
        n: (q.shape, q.format.name) for n, q in tensors.items()
    }
    assert all(same(reader.read(name), q) for name, q in tensors.items())
    for rows in (slice(0, 1), slice(5, 40), slice(7, 9), slice(64, 96), slice(95, 200)):
        assert same(reader.read("a.weight", rows), rows_of(tensors["a.weight"], rows)), rows
    assert KIND.rehash(tmp_path / "out") == digests
    assert configuration(tmp_path / "out")["group_size"] == (-1 if group == "row" else group)


def test_what_stays_in_floating_point_is_named(tmp_path):
    kept = QTensor(Float(torch.float16), torch.ones(32, 64).half(), {})
    tensors = {"a.weight": matrix(), "b.weight": kept, "embed_tokens.weight": kept, "lm_head.weight": kept}
    write(KIND, tmp_path / "out", tensors)
    assert configuration(tmp_path / "out")["modules_to_not_convert"][:2] == ["b", "lm_head"]
    assert "embed_tokens" not in configuration(tmp_path / "out")["modules_to_not_convert"]


def test_one_group_size_for_all(tmp_path):
    with pytest.raises(UnsupportedError, match=r"one group size, but a\.weight has 16 and b\.weight has 32"):
        write(KIND, tmp_path / "out", {"a.weight": matrix(16), "b.weight": matrix(32)})
    assert not list(tmp_path.iterdir())


def test_scales_that_are_no_float16_numbers_are_refused(tmp_path):
    q = quantized(FORMATS["int4-asym"], torch.randn(32, 64))
    with pytest.raises(UnsupportedError, match=r"are no float16 numbers.*-g128"):
        write(KIND, tmp_path / "out", {"m.weight": q})


def test_which_formats_it_holds():
    held = {f.name for f in FORMATS.values() if KIND.admits(Entry("m.weight", (32, 128), f)) is None}
    assert held == {"fp32", "fp16", "bf16"} | {f"int4-asym{g}" for g in ("", "-g16", "-g32", "-g64", "-g128")}


@pytest.mark.parametrize(
    ("name", "shape", "format", "message"),
    [
        ("m.weight", (32, 64), "int4-g32", "4-bit integers with zero-points, not int4-g32; choose int4-asym-g128"),
        ("m.weight", (32, 64), "int8-asym-g32", "not int8-asym-g32"),
        ("m.weight", (32, 64), "nf4", "not nf4"),
        ("m.weight", (32, 64), "int4-asym-tensor", "not one a matrix"),
        ("m.weight", (32, 72), "int4-asym-g16", "in_features 72 is no multiple"),
        ("m.weight", (30, 64), "int4-asym-g32", "out_features 30 times 4 bits is no multiple of 32"),
        ("lm_head.weight", (32, 64), "int4-asym-g32", "keeps the projection to the vocabulary"),
        ("model.embed_tokens.weight", (32, 64), "int4-asym-g32", "quantizes linear layers"),
        ("experts", (2, 32, 64), "int4-asym-g32", "quantizes linear layers"),
    ],
)
def test_refusals(tmp_path, name, shape, format, message):
    entry = Entry(name, shape, FORMATS[format])
    assert message in KIND.admits(entry)
    with pytest.raises(UnsupportedError, match=re.escape(name)):
        KIND.create(tmp_path / "out", [entry], tmp_path, {})


def test_rounded_inputs_are_refused():
    entry = Entry("m.weight", (32, 64), FORMATS["int8"], ACTIVATIONS["int8-token"])
    assert "cannot say that inputs are rounded to int8-token" in KIND.admits(entry)


@pytest.mark.skipif(KIND.decoder is None, reason="needs gptqmodel")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its temporary folders, left behind
def test_gptqmodel_decodes_every_matrix_bit_for_bit(tmp_path):
    tensors = {"a.weight": matrix(shape=(96, 64)), "norm.weight": NORM}
    write(KIND, tmp_path / "out", tensors)
    decoded = foreign(KIND, tmp_path / "out")
    assert decoded.keys() == tensors.keys()
    assert all(torch.equal(decoded[name], q.dequantize()) for name, q in tensors.items())


def test_the_file_that_came_before_the_configuration_is_read(tmp_path):
    write(KIND, tmp_path / "out", {"m.weight": matrix()})
    whole = json.loads((tmp_path / "out/config.json").read_text())
    del whole["quantization_config"]
    (tmp_path / "out/config.json").write_text(json.dumps(whole))
    old = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "out/quant_config.json").write_text(json.dumps(old))
    kind, reader = open_checkpoint(tmp_path / "out")
    assert kind is KIND
    assert same(reader.read("m.weight"), matrix())


def test_models_are_written_read_and_run(tmp_path):
    save_model(tmp_path / "source", "llama", hidden_size=64, intermediate_size=128)
    made = fewbits.quantize(tmp_path / "source", tmp_path / "out", format="int4-asym-g32", kind="awq")
    assert {t.format for t in made.tensors if "proj" in t.name} == {"int4-asym-g32"}
    assert fewbits.verify(tmp_path / "out", tmp_path / "source").passed
    fewbits.quantize(tmp_path / "source", tmp_path / "ours", format="int4-asym-g32", kind="fewbits")
    ids = torch.arange(2, 34).view(1, 32)
    with torch.inference_mode():
        logits = [fewbits.load(tmp_path / path)(ids).logits for path in ("out", "ours")]
    assert torch.equal(*logits)


@pytest.fixture
def folder(tmp_path):
    write(KIND, tmp_path / "out", {"m.weight": matrix(), "norm.weight": NORM})
    return tmp_path / "out"


def read_all(path):
    reader = open_checkpoint(path)[1]
    for name in reader.entries:
        reader.read(name).dequantize()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"m__qweight": torch.zeros(64, 5, dtype=I32)}, r"is torch.int32 \[4, 4\]|needs"),
        ({"m__qweight": torch.zeros(32, dtype=I32)}, "must be a matrix"),
        ({"m__qweight": torch.zeros(64, 4)}, r"is torch.float32 \[64, 4\], but int4-asym-g16"),
        ({"m__qzeros": torch.zeros(3, 4, dtype=I32)}, r"'m\.qzeros' is torch.int32 \[3, 4\]"),
        ({"m__scales": torch.zeros(4, 32, dtype=I32)}, "must be floating point"),
        ({"m__scales": torch.full((4, 32), torch.nan).half()}, "scales that are not finite"),
        ({"m__weight": torch.zeros(32, 64)}, "beside its quantized form"),
        ({"embed_tokens__qweight": torch.zeros(8, 32, dtype=I32)}, "quantized embedding"),
    ],
)
def test_damage_is_named(folder, arrays, message):
    rewrite(folder, **arrays)
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "AWQ in the layout 'gemm' with 8 bits"),
        ({"version": "gemv"}, "AWQ in the layout 'gemv'"),
        ({"version": 3}, "AWQ in the layout 3"),
        ({"dynamic": {"m": {"bits": 8}}}, "a size of its own for some layers"),
        ({"group_size": 32}, r"'m\.qzeros' is torch.int32 \[4, 4\], but int4-asym-g32 \[32, 64\], as config.json"),
        ({"group_size": 0}, "group_size is 0, must be above 0"),
        ({"group_size": "128"}, "group_size is '128'"),
    ],
)
def test_configurations_that_disagree_are_named(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_all(folder)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "out"
    write(KIND, path, {"m.weight": matrix(), "norm.weight": NORM})
    return path, (path / "config.json").read_text(), load_file(path / "model.safetensors")


JUNK = st.sampled_from([None, -1, 0, 1, 4, 3.5, 2**31, 10**30, True, "x", "gemm", "GEMM", [], [[]], {}, {"m": {}}])
KEYS = ["quant_method", "version", "bits", "group_size", "zero_point", "dynamic", "modules_to_not_convert", "w_bit"]


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3))
def test_a_damaged_configuration_raises_nothing_else(shared_folder, changes):
    path, sound, arrays = shared_folder
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(sound)
    configure(path, **changes)
    with suppress(CheckpointError):
        read_all(path)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["m.qweight", "m.qzeros", "m.scales"]),
    shape=st.lists(st.integers(0, 65), max_size=3),
    dtype=st.sampled_from([torch.int32, torch.float16, torch.int64, torch.uint8, torch.bfloat16]),
    value=st.sampled_from([-(2**31), -1, 0, 1, 3, 100]),
)
def test_damaged_arrays_raise_nothing_else(shared_folder, name, shape, dtype, value):
    path, sound, arrays = shared_folder
    (path / "config.json").write_text(sound)
    save_file(arrays | {name: torch.full(shape, value).to(dtype)}, path / "model.safetensors")
    with suppress(CheckpointError):
        read_all(path)
