"""GGUF files against gguf-py, bytes worked out by hand, and hostile headers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import tracemalloc
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from folders import entries_of, floating, foreign, quantized, rows_of, write
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.checkpoint import Entry, open_checkpoint
from fewbits.checkpoint._gguf_header import HEADER_LIMIT
from fewbits.checkpoint.gguf import Gguf
from fewbits.errors import CheckpointError, LedgerError, OutputError, UnsupportedError
from fewbits.formats import FORMATS, Float, format_named
from fewbits.formats._blocks import Block

KIND = Gguf()
BLOCKS = [
    format for format in FORMATS.values() if (isinstance(format, Block) and format.runs) or format.name == "mxfp4"
]
METADATA = {
    "general.architecture": "llama",
    "general.name": "ein Häuschen",
    "a.uint32": 7,
    "a.float32": 0.1,
    "a.bool": True,
    "a.int64": np.int64(-(1 << 40)),
    "a.uint8": np.uint8(200),
    "a.float64": np.float64(0.1),
    "a.strings": ["", "▁x", "\n"],
    "a.no_strings": [],
    "a.int32s": [-1, 5],
    "a.floats": [0.5, -1.25],
    "a.bools": [True, False],
    "a.uint16s": np.array([1, 65535], dtype=np.uint16),
    "tokenizer.ggml.tokens": ["<unk>", "</s>"],
    "tokenizer.ggml.eos_token_id": 1,
}


def tensors():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 256, generator=generator)
    found = {f"blk.0.{format.name}.weight": quantized(format, w) for format in BLOCKS}
    found |= {f"blk.0.{dtype}.weight": floating(w.to(dtype)) for dtype in (torch.float16, torch.bfloat16)}
    found["experts"] = quantized(format_named("q8_0"), torch.randn(3, 4, 32, generator=generator))
    found["norm.weight"] = floating(torch.randn(5, generator=generator))
    return found


def test_smallest_file_by_hand(tmp_path):
    path = tmp_path / "a.gguf"
    write(KIND, path, {"t": floating(torch.tensor([[1.0, -2.0]]))}, config={"k": True, "general.file_type": 0})
    expected = (
        b"GGUF\x03\0\0\0"
        b"\x01\0\0\0\0\0\0\0"  # one tensor
        b"\x03\0\0\0\0\0\0\0"  # three pairs
        b"\x01\0\0\0\0\0\0\0k\x07\0\0\0\x01"  # bool
        b"\x11\0\0\0\0\0\0\0general.file_type\x04\0\0\0\0\0\0\0"  # uint32
        b"\x1c\0\0\0\0\0\0\0general.quantization_version\x04\0\0\0\x02\0\0\0"
        b"\x01\0\0\0\0\0\0\0t"
        b"\x02\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"  # two dimensions, the fastest first
        b"\0\0\0\0\0\0\0\0\0\0\0\0"  # F32 at offset 0
    )
    expected += bytes(-len(expected) % 32)
    expected += b"\0\0\x80\x3f\0\0\0\xc0" + bytes(24)
    assert path.read_bytes() == expected


def test_gguf_py_reads_the_same_metadata_and_numbers(tmp_path):
    path, written = tmp_path / "m.gguf", tensors()
    write(KIND, path, written, config=METADATA, rows=2)
    theirs = GGUFReader(path)
    for key, value in METADATA.items():
        field = theirs.fields[key].contents()
        expected = np.float32(value) if type(value) is float else value
        assert field == (expected.tolist() if isinstance(value, np.ndarray) else expected), key
    kinds = {key: [kind.name for kind in theirs.fields[key].types] for key in METADATA}
    assert kinds["a.uint32"] == ["UINT32"]
    assert kinds["a.float32"] == ["FLOAT32"]
    assert kinds["a.int64"] == ["INT64"]
    assert kinds["a.uint8"] == ["UINT8"]
    assert kinds["a.float64"] == ["FLOAT64"]
    assert kinds["a.int32s"] == ["ARRAY", "INT32"]
    assert kinds["a.floats"] == ["ARRAY", "FLOAT32"]
    assert kinds["a.uint16s"] == ["ARRAY", "UINT16"]
    assert kinds["a.bools"] == ["ARRAY", "BOOL"]
    decoded = foreign(KIND, path)
    assert decoded.keys() == written.keys()
    for name, q in written.items():
        assert torch.equal(decoded[name], q.dequantize()), name


def test_reads_back_what_was_written(tmp_path):
    path, written = tmp_path / "m.gguf", tensors()
    digests = write(KIND, path, written, config=METADATA)
    kind, reader = open_checkpoint(path)
    assert kind.name == "gguf"
    assert reader.config["a.strings"] == METADATA["a.strings"]
    assert reader.config["a.int64"] == -(1 << 40)
    assert reader.config["general.quantization_version"] == 2
    for name, q in written.items():
        assert reader.entries[name] == Entry(name, q.shape, q.format)
        assert torch.equal(reader.read(name).dequantize(), q.dequantize())
        assert torch.equal(reader.read(name, slice(1, 3)).dequantize(), q.dequantize()[1:3])
    assert kind.rehash(path) == digests
    blocks = written["blk.0.q4_0.weight"].pack()["blocks"].numpy().tobytes()
    assert digests["blk.0.q4_0.weight"] == {"blocks": hashlib.sha256(blocks).hexdigest()}


def test_reads_what_gguf_py_writes(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("names", ["a", "b"])
    w = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("q", gguf.quantize(w, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("i", np.array([1, -1], dtype=np.int64))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    reader = KIND.open(path)
    assert reader.config["names"] == ["a", "b"]
    expected = gguf.dequantize(gguf.quantize(w, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(reader.read("q").dequantize().numpy(), expected)
    assert reader.read("i").codes.tolist() == [1, -1]


def test_alignment_is_honoured(tmp_path):
    path = tmp_path / "m.gguf"
    write(KIND, path, tensors(), config={"general.alignment": 128})
    theirs = GGUFReader(path)
    assert all(tensor.data_offset % 128 == 0 for tensor in theirs.tensors)
    assert torch.equal(foreign(KIND, path)["norm.weight"], tensors()["norm.weight"].codes)


def test_any_order_and_threads_make_the_same_file(tmp_path):
    written = tensors()
    write(KIND, tmp_path / "plain.gguf", written, config=METADATA)
    with KIND.create(tmp_path / "threads.gguf", entries_of(written), tmp_path, METADATA) as writer:

        def pour(name):
            for row in range(written[name].shape[0]):
                writer.write(name, rows_of(written[name], slice(row, row + 1)))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(pour, reversed(written)))
        writer.commit({})
    assert (tmp_path / "threads.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_commit_leaves_three_files(tmp_path):
    write(KIND, tmp_path / "m.gguf", tensors(), config=METADATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.Modelfile", "m.fewbits.json", "m.gguf"]
    assert json.loads((tmp_path / "m.fewbits.json").read_text()) == {"kind": "gguf"}
    modelfile = (tmp_path / "m.Modelfile").read_text().splitlines()
    assert modelfile[1:] == ["FROM ./m.gguf", 'PARAMETER stop "</s>"']


@pytest.mark.parametrize(("format", "number"), [("fp32", 0), ("fp16", 1), ("bf16", 32), ("q4_0", 2), ("q8_0", 7)])
def test_file_type_is_that_of_most_weights(tmp_path, format, number):
    w = {"a.weight": quantized(format_named(format), torch.ones(8, 32)), "b": floating(torch.ones(2, 32))}
    write(KIND, tmp_path / "m.gguf", w, config={})
    assert gguf.LlamaFileType(KIND.open(tmp_path / "m.gguf").config["general.file_type"]).value == number


@pytest.mark.parametrize("name", ["m.gguf", "m.fewbits.json", "m.Modelfile"])
def test_existing_output_is_refused_and_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=name):
        write(KIND, tmp_path / "m.gguf", tensors())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_abort_leaves_nothing(tmp_path):
    writer = KIND.create(tmp_path / "m.gguf", entries_of(tensors()), tmp_path, METADATA)
    writer.write("norm.weight", tensors()["norm.weight"])
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="abandoned"):
        writer.write("experts", tensors()["experts"])


def test_unfinished_entry_is_not_committed(tmp_path):
    written = tensors()
    with KIND.create(tmp_path / "m.gguf", entries_of(written), tmp_path, METADATA) as writer:
        for name, q in written.items():
            writer.write(name, rows_of(q, slice(0, 2)) if name == "experts" else q)
        with pytest.raises(LedgerError, match="experts"):
            writer.commit({})
    assert list(tmp_path.iterdir()) == []


def test_failure_in_the_last_step_leaves_nothing(tmp_path):
    with KIND.create(tmp_path / "m.gguf", [], tmp_path, METADATA) as writer, pytest.raises(TypeError):
        writer.commit({"not JSON": object()})
    assert list(tmp_path.iterdir()) == []
    with KIND.create(tmp_path / "m.gguf", [], tmp_path, METADATA) as writer:
        (tmp_path / "m.Modelfile").mkdir()
        with pytest.raises(OutputError, match="Modelfile"):
            writer.commit({})
    assert [path.name for path in tmp_path.iterdir()] == ["m.Modelfile"]


def test_more_rows_than_declared_are_refused(tmp_path):
    with KIND.create(tmp_path / "m.gguf", entries_of(tensors()), tmp_path, METADATA) as writer:
        writer.write("norm.weight", tensors()["norm.weight"])
        with pytest.raises(LedgerError, match=r"norm\.weight"):
            writer.write("norm.weight", tensors()["norm.weight"])
        with pytest.raises(LedgerError, match="not declared"):
            writer.write("other", tensors()["norm.weight"])


def test_full_disk_is_found_before_and_while_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(100, 0, 100))
        with pytest.raises(OutputError, match=r"needs .* GB and 0\.00 GB are free"):
            write(KIND, tmp_path / "m.gguf", tensors())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OutputError, match="No space left"):
                write(KIND, tmp_path / "m.gguf", tensors())
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry("w", (4, 32), format_named("int4-g32")), "no type for int4-g32"),
        (Entry("w", (4, 32), Float(torch.float64)), "no type for"),
        (Entry("w", (4, 256), format_named("q8_k")), "runs no weights in it"),
        (Entry("n", (32,), Float(torch.float16)), "fp32 only"),
        (Entry("w" * 64, (4, 32), format_named("q8_0")), "63 bytes"),
        (Entry("w", (1, 1, 1, 1, 32), Float(torch.float32)), "1 to 4 dimensions"),
        (Entry("w", (4, 40), format_named("mxfp4")), "40 is not a multiple of its block of 32"),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(tmp_path, entry, reason):
    assert reason in KIND.admits(entry)
    with pytest.raises(UnsupportedError, match=entry.name):
        KIND.create(tmp_path / "m.gguf", [entry], tmp_path, {})


@pytest.mark.parametrize("value", [None, -1, 1 << 32, 1j, [1, "a"], [1 << 31], [[1]], {"a": 1}])
def test_values_without_a_type_are_refused_by_key(tmp_path, value):
    with pytest.raises(UnsupportedError, match=r"some\.key"):
        KIND.create(tmp_path / "m.gguf", [], tmp_path, {"some.key": value})
    assert list(tmp_path.iterdir()) == []


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def head(tensors=0, pairs=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def tensor(shape, kind=0, offset=0, name="t"):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = (1 << 64) - 1
HOSTILE = {
    "no magic": b"GGML" + bytes(60),
    "empty": b"",
    "version 1": head(version=1),
    "version 4": head(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensors without end": head(tensors=HUGE) + bytes(100),
    "pairs without end": head(pairs=1 << 40) + bytes(100),
    "endless key": head(pairs=1) + struct.pack("<Q", HUGE) + bytes(100),
    "long key": head(pairs=1) + struct.pack("<Q", 1 << 17) + bytes(1 << 18),
    "endless string": head(pairs=1) + string("k") + struct.pack("<IQ", 8, HUGE),
    "endless array": head(pairs=1) + string("k") + struct.pack("<IIQ", 9, 4, 1 << 62),
    "endless strings": head(pairs=1) + string("k") + struct.pack("<IIQ", 9, 8, 1 << 62),
    "array of arrays": head(pairs=1) + string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(100),
    "unknown value type": head(pairs=1) + string("k") + struct.pack("<I", 13) + bytes(100),
    "bool that is neither": head(pairs=1) + string("k") + struct.pack("<IB", 7, 2) + bytes(100),
    "key twice": head(pairs=2) + 2 * (string("k") + struct.pack("<IB", 7, 1)),
    "alignment 0": head(pairs=1) + string("general.alignment") + struct.pack("<II", 4, 0),
    "alignment 33": head(pairs=1) + string("general.alignment") + struct.pack("<II", 4, 33),
    "alignment in words": head(pairs=1) + string("general.alignment") + struct.pack("<I", 8) + string("32"),
    "five dimensions": head(tensors=1) + tensor((1, 1, 1, 1, 1)) + bytes(100),
    "overflowing shape": head(tensors=1) + tensor((1 << 32, 1 << 32)) + bytes(100),
    "endless shape": head(tensors=1) + tensor((0, HUGE)) + bytes(100),
    "data beyond the end": head(tensors=1) + tensor((1024,)) + bytes(100),
    "offset beyond the end": head(tensors=1) + tensor((1,), offset=1 << 63) + bytes(100),
    "crooked offset": head(tensors=1) + tensor((1,), offset=4) + bytes(100),
    "tensor twice": head(tensors=2) + 2 * tensor((1,)) + bytes(100),
    "name that is no text": head(tensors=1) + tensor((1,), name="t").replace(b"t", b"\xff") + bytes(100),
    "key that cannot be printed": head(pairs=1) + string("k\x1b") + struct.pack("<IB", 7, 1),
    "ragged blocks": head(tensors=1) + tensor((33, 2), kind=8) + bytes(200),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_fast_and_small(tmp_path, name):
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[name])
    refusal, peak = opened(path)
    assert isinstance(refusal, CheckpointError)
    assert "m.gguf" in str(refusal)
    assert peak < 4 << 20


def test_endless_header_stops_at_the_limit(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(head(pairs=1) + string("k") + struct.pack("<IIQ", 9, 0, 8 * HEADER_LIMIT))
    os.truncate(path, 100 * HEADER_LIMIT)  # sparse: it takes no room
    refusal, peak = opened(path)
    assert isinstance(refusal, CheckpointError)
    assert peak < 4 << 20


@pytest.mark.parametrize(("kind", "named"), [(16, "IQ2_XXS"), (40, "NVFP4"), (4711, "4711, unknown")])
def test_types_it_does_not_read_are_named(tmp_path, kind, named):
    path = tmp_path / "m.gguf"
    path.write_bytes(head(tensors=1) + tensor((256, 1), kind=kind) + bytes(1000))
    with pytest.raises(CheckpointError, match=named):
        KIND.open(path)


@pytest.mark.parametrize("kind", [2, 14, 39])
def test_ragged_blocks_are_refused(tmp_path, kind):
    """Of Q4_0, Q6_K and MXFP4, whose last groups may be short in other files."""
    path = tmp_path / "m.gguf"
    path.write_bytes(head(tensors=1) + tensor((258, 1), kind=kind) + bytes(1000))
    with pytest.raises(CheckpointError, match="in_features 258 is not a multiple of its block"):
        KIND.open(path)


def test_q8_k_is_read_all_the_same(tmp_path):
    """A file that gguf-py wrote: a scale of 2, codes of 3, and the sums of 16 of them."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    data = np.frombuffer(struct.pack("<f256b16h", 2.0, *[3] * 256, *[48] * 16), np.uint8)
    writer.add_tensor("w", data.reshape(1, 292), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    assert torch.equal(KIND.open(tmp_path / "m.gguf").read("w").dequantize(), torch.full((1, 256), 6.0))


def opened(path):
    """What opening and reading everything raises, and the most memory it took (bytes)."""
    tracemalloc.start()
    try:
        reader = KIND.open(path)
        for name in reader.entries:
            reader.read(name)
    except CheckpointError as error:
        return error, tracemalloc.get_traced_memory()[1]
    else:
        return None, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    written = {"a.weight": quantized(format_named("q4_1"), torch.randn(2, 32)), "n": floating(torch.ones(3))}
    write(KIND, folder / "m.gguf", written, config=METADATA)
    return (folder / "m.gguf").read_bytes()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_cut_short_anywhere(whole, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 33))])  # the last 32 bytes are mostly padding
    refusal, peak = opened(path)
    assert isinstance(refusal, CheckpointError)
    assert peak < 4 << 20


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_flipped_bits_and_absurd_words(whole, tmp_path_factory, data):
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 8))
        if data.draw(st.booleans()):
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            damaged[at : at + 8] = data.draw(st.sampled_from([HUGE, 1 << 40, 1 << 31, 0])).to_bytes(8, "little")
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(damaged)
    _, peak = opened(path)  # anything but CheckpointError fails the test
    assert peak < 4 << 20
