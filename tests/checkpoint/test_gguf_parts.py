"""Models in several GGUF files: gguf-py writes and reads them, llama.cpp loads them."""

from __future__ import annotations

import shutil
import struct
from collections import namedtuple
from importlib.resources import as_file, files
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from folders import floating, foreign, quantized, write
from gguf import GGUFReader, GGUFWriter

from fewbits.checkpoint import open_checkpoint
from fewbits.checkpoint.gguf import Gguf
from fewbits.checkpoint.gguf_parts import merge, part_path, split
from fewbits.errors import CheckpointError, OutputError, UnsupportedError
from fewbits.evals import model_identity
from fewbits.formats import format_named

KIND = Gguf()
ROW = {"a": 6 * 34 * 2, "b": 6 * 18 * 2, "c": 6 * 64 * 4, "norm": 5 * 4}  # bytes of each tensor


def tensors() -> dict[str, object]:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    return {
        "a": quantized(format_named("q8_0"), w),
        "b": quantized(format_named("q4_0"), w),
        "c": floating(w),
        "norm": floating(w[0, :5].clone()),
    }


def whole(folder: Path, alignment: int = 32) -> Path:
    path = folder / "m.gguf"
    config = {"general.architecture": "llama", "general.alignment": alignment, "a.int64": np.int64(-5), "none": []}
    write(KIND, path, tensors(), config=config | {"a.u8s": np.array([], np.uint8), "a.f64": np.float64(0.1)})
    return path


def by_gguf_py(path: Path, type: int = 8, **keys: int) -> Path:
    """One file of gguf-py's, with metadata of many types and two tensors, the first of a type and 68 bytes."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_array("i16s", [-3, 4])
    writer.add_float64("f64", 0.1)
    writer.add_bool("flag", True)
    writer.add_array("names", ["", "▁x", "é"])
    for key, value in keys.items():
        writer.add_uint16(f"split.{key}", value)
    writer.add_tensor("q", np.arange(68, dtype=np.uint8).reshape(2, 34), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("n", np.arange(5, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    data = path.read_bytes()
    at = data.index(struct.pack("<QQ", 32, 2) + struct.pack("<I", 8)) + 16  # dimensions of q, then its type
    path.write_bytes(data[:at] + struct.pack("<I", type) + data[at + 4 :])
    return path


@pytest.mark.parametrize("alignment", [32, 64, 8])
@pytest.mark.parametrize("limit", [{"max_tensors": 1}, {"max_tensors": 3}, {"max_bytes": 2000}, {"max_bytes": 1 << 30}])
def test_joined_parts_are_the_file_that_was_split(tmp_path, alignment, limit):
    path = whole(tmp_path, alignment)
    parts = split(path, tmp_path / "parts" / "x", **limit)
    merge(parts[0], tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    assert sorted(tmp_path.joinpath("parts").iterdir()) == parts


@pytest.mark.parametrize("type", [8, 4711])
def test_files_of_gguf_py_come_back_byte_by_byte(tmp_path, type):
    """So do tensors of a type that nobody knows."""
    path = by_gguf_py(tmp_path / "m.gguf", type)
    parts = split(path, tmp_path / "x", max_tensors=1)
    assert len(parts) == 2
    merge(parts[0], tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_parts_are_as_llama_cpp_makes_them(tmp_path):
    """Names, keys and their types; all of the metadata in the first part and none in the others."""
    parts = split(whole(tmp_path), tmp_path / "x", max_tensors=2)
    assert [path.name for path in parts] == ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
    first, second = (GGUFReader(path) for path in parts)
    for number, reader in enumerate((first, second)):
        keys = {key: reader.fields[f"split.{key}"] for key in ("no", "count", "tensors.count")}
        assert [field.contents() for field in keys.values()] == [number, 2, 4]
        assert [field.types[0].name for field in keys.values()] == ["UINT16", "UINT16", "INT32"]
    assert [tensor.name for tensor in first.tensors] == ["a", "b"]
    assert [tensor.name for tensor in second.tensors] == ["c", "norm"]
    assert first.fields["a.int64"].types[0].name == "INT64"
    assert not any(key.startswith(("general.", "a.")) for key in second.fields)


@pytest.mark.parametrize(("most", "parts"), [
    (ROW["c"], [["a", "b"], ["c"], ["norm"]]),
    (416 + 224, [["a", "b"], ["c"], ["norm"]]),  # a and b, padded to 32
    (416 + 223, [["a"], ["b"], ["c"], ["norm"]]),
    (416 + 224 + 1536, [["a", "b", "c"], ["norm"]]),
])  # fmt: skip
def test_parts_hold_as_many_bytes_as_allowed(tmp_path, most, parts):
    if most < ROW["c"]:
        with pytest.raises(UnsupportedError, match=rf"'c' takes {ROW['c']} bytes"):
            split(whole(tmp_path), tmp_path / "x", max_bytes=most)
        return
    found = split(whole(tmp_path), tmp_path / "x", max_bytes=most)
    assert [[tensor.name for tensor in GGUFReader(path).tensors] for path in found] == parts


def test_the_first_part_is_the_model(tmp_path):
    written = tensors()
    path = whole(tmp_path)
    parts = split(path, tmp_path / "x", max_tensors=1)
    kind, reader = open_checkpoint(parts[0])
    _, original = open_checkpoint(path)
    assert dict(reader.entries) == dict(original.entries)
    assert {key: value for key, value in reader.config.items() if not key.startswith("split.")} == original.config
    assert all(torch.equal(reader.read(n).dequantize(), q.dequantize()) for n, q in written.items())
    assert torch.equal(reader.read("c", slice(2, 4)).codes, written["c"].codes[2:4])
    assert all(torch.equal(w, written[name].dequantize()) for name, w in foreign(kind, parts[0]).items())
    before = model_identity(parts[0])
    last = parts[-1].read_bytes()
    parts[-1].write_bytes(last[:-1] + b"\x01")
    assert model_identity(parts[0]) != before


def test_what_is_no_first_part_says_which_is(tmp_path):
    parts = split(whole(tmp_path), tmp_path / "x", max_tensors=2)
    with pytest.raises(CheckpointError, match=r"part 2 of 2 of a model; give the first, .*x-00001-of-00002\.gguf"):
        KIND.open(parts[1])
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"must be named NAME-00001-of-00002\.gguf"):
        KIND.open(renamed)


def test_a_missing_part_is_named(tmp_path):
    parts = split(whole(tmp_path), tmp_path / "x", max_tensors=1)
    parts[2].unlink()
    for use in (KIND.open, lambda path: merge(path, tmp_path / "again.gguf")):
        with pytest.raises(CheckpointError, match=r"x-00003-of-00004\.gguf is missing: part 3 of 4"):
            use(parts[0])
    assert not (tmp_path / "again.gguf").exists()


def test_parts_of_other_models_are_refused(tmp_path):
    path = whole(tmp_path)
    parts = split(path, tmp_path / "x", max_tensors=2)
    second = parts[1].read_bytes()
    shutil.copy(parts[0], parts[1])
    with pytest.raises(CheckpointError, match=r"x-00002-of-00002\.gguf: its split\.no is 0 of 2, must be 1 of 2"):
        KIND.open(parts[0])
    parts[1].write_bytes(second.replace(struct.pack("<Q", 1) + b"c", struct.pack("<Q", 1) + b"a"))
    for use in (KIND.open, lambda first: merge(first, tmp_path / "again.gguf")):
        with pytest.raises(CheckpointError, match=r"same tensor|is also in"):
            use(parts[0])
    first = by_gguf_py(part_path(tmp_path / "y", 0, 2), no=0, count=2, **{"tensors.count": 5})
    by_gguf_py(part_path(tmp_path / "y", 1, 2), no=1, count=2)
    with pytest.raises(CheckpointError, match=r"hold 4 tensors, and split\.tensors\.count says 5"):
        KIND.open(first)


def test_files_that_llama_cpp_joined_are_whole(tmp_path):
    path = by_gguf_py(tmp_path / "m.gguf", no=0, count=0)
    assert list(KIND.open(path).entries) == ["q", "n"]


def test_cut_short_files_are_not_split(tmp_path):
    path = whole(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])  # norm takes 20 of the last 32 bytes
    with pytest.raises(CheckpointError, match=r"'norm' .*cut short"):
        split(path, tmp_path / "x", max_tensors=1)
    assert list(tmp_path.glob("x*")) == []


def test_nothing_is_overwritten_and_nothing_left(tmp_path, monkeypatch):
    path = whole(tmp_path)
    taken = part_path(tmp_path / "x", 3, 4)
    taken.write_text("mine")
    with pytest.raises(OutputError, match="x-00004-of-00004"):
        split(path, tmp_path / "x", max_tensors=1)
    with pytest.raises(OutputError, match="exists already"):
        merge(path, taken)
    assert [found.name for found in tmp_path.glob("x*")] == [taken.name]
    taken.unlink()
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(100, 0, 100))
        with pytest.raises(OutputError, match="are free"):
            split(path, tmp_path / "x", max_tensors=1)
    real = Path.rename

    def fails(self, target):
        if "00001-of" in str(target):
            raise OSError(5, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OutputError, match="Input/output error"):
            split(path, tmp_path / "x", max_tensors=1)
    assert list(tmp_path.glob("x*")) == []


def test_limits_must_be_given_and_possible(tmp_path):
    path = whole(tmp_path)
    for limits in ({}, {"max_bytes": 5000, "max_tensors": 1}, {"max_tensors": 0}):
        with pytest.raises(UnsupportedError, match="one limit"):
            split(path, tmp_path / "x", **limits)


def test_llama_cpp_loads_the_parts(tmp_path):
    """The same predictions as from the single file."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from fewbits import quantize

    with as_file(files("fewbits") / "bundled" / "tiny") as folder:
        quantize(folder, tmp_path / "m.gguf", format="q8_0", prove=False)
    parts = split(tmp_path / "m.gguf", tmp_path / "parts", max_bytes=1_000_000)
    assert len(parts) > 2
    scores = []
    for path in (tmp_path / "m.gguf", parts[0]):
        model = llama_cpp.Llama(str(path), n_ctx=32, logits_all=True, verbose=False)
        model.eval(list(range(5, 25)))
        scores.append(model.scores[:20].copy())
    assert np.array_equal(*scores)
