"""Safetensors folders: what is sound is read in bounded memory, everything else is one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from folders import CONFIG, foreign, raw_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from fewbits.checkpoint import KINDS, open_checkpoint
from fewbits.errors import CheckpointError

KIND = KINDS["huggingface"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def sharded(folder, shards, weight_map=None):
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = weight_map or {t: name for name, tensors in shards.items() for t in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_single_file(folder):
    tensors = {
        "a": torch.randn(6, 4, dtype=torch.float16),
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "n": torch.arange(5),
        "flag": torch.tensor([True, False, True]),
        "s": torch.tensor(2.5),
        "none": torch.empty(0, 3),
    }
    save_file(tensors, folder / "model.safetensors")
    kind, reader = open_checkpoint(folder)
    assert kind is KIND
    assert reader.config == CONFIG
    assert reader.entries.keys() == tensors.keys()
    for name, t in tensors.items():
        found = reader.read(name).codes
        assert found.dtype == t.dtype
        assert torch.equal(found.view(torch.uint8) if t.dtype.itemsize == 1 else found, _bytes(t)), name
    assert torch.equal(reader.read("a", slice(2, 5)).codes, tensors["a"][2:5])
    assert torch.equal(reader.read("a", slice(4, 99)).codes, tensors["a"][4:])
    assert {name: w.dtype for name, w in foreign(kind, folder).items()} == dict.fromkeys(tensors, torch.float32)


def _bytes(t):
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def test_a_read_tensor_can_be_changed_without_touching_the_file(folder):
    save_file({"a": torch.ones(4, 4)}, folder / "model.safetensors")
    reader = KIND.open(folder)
    reader.read("a").codes.zero_()
    assert torch.equal(reader.read("a").codes, torch.ones(4, 4))


def test_unaligned_arrays_are_read(folder):
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "float": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    raw_file(folder / "model.safetensors", header, b"\x07" + torch.tensor([1.0, 2.0]).numpy().tobytes())
    assert KIND.open(folder).read("float").codes.tolist() == [1.0, 2.0]


def test_shards(folder):
    sharded(folder, {"x-1.safetensors": {"a": torch.ones(2)}, "x-2.safetensors": {"b": torch.zeros(2)}})
    save_file({"a": torch.zeros(9)}, folder / "consolidated.safetensors")  # beside the model, not in its index
    reader = KIND.open(folder)
    assert {n: reader.read(n).codes.tolist() for n in reader.entries} == {"a": [1, 1], "b": [0, 0]}


def test_missing_shard(folder):
    sharded(folder, {"x-1.safetensors": {"a": torch.ones(2)}, "x-2.safetensors": {"b": torch.zeros(2)}})
    (folder / "x-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"x-2\.safetensors: this shard is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "x.safetensors"}, "tensor 'b' is in this shard"),
        ({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}, "tensor 'c' is not in this shard"),
        ({"a": "../x.safetensors"}, "do not trust"),
        ({"a": "/etc/passwd"}, "do not trust"),
        ({"a": "sub/x.safetensors"}, "do not trust"),
        ({"a": 3}, "do not trust"),
        ({}, "weight_map"),
    ],
)
def test_index_and_shard_disagree(folder, weight_map, message):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "x.safetensors")
    save_file({"a": torch.ones(2)}, folder.parent / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder)


def test_the_same_tensor_in_two_shards(folder):
    shards = {"x-1.safetensors": {"a": torch.ones(2)}, "x-2.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}}
    sharded(folder, shards, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    with pytest.raises(CheckpointError, match="'a' is also in"):
        KIND.open(folder)


def test_the_same_tensor_twice_in_the_index(folder):
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}')
    with pytest.raises(CheckpointError, match="twice"):
        KIND.open(folder)


def _entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": _entry(0, 8), "b": _entry(4, 12)},  # overlap
        {"a": _entry(0, 8), "b": _entry(16, 24)},  # hole
        {"a": _entry(8, 0)},
        {"a": _entry(0, 2**62, shape=(2**60,))},
        {"a": _entry(0, 8, shape=(2**63, 2**63))},
        {"a": _entry(0, 8, shape=(-2,))},
        {"a": _entry(0, 8, dtype="F99")},
        {"a": _entry(0, 8, shape=(3,))},
        {"a": {"dtype": "F32"}},
        {"a": 1},
        [],
        "{",
        "[" * 100_000,
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
    ],
)
def test_malicious_header(folder, header):
    raw_file(folder / "model.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**64 - 1])
def test_absurd_header_length(folder, length):
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(CheckpointError, match="download it again"):
        KIND.open(folder)


def test_types_we_do_not_read(folder):
    raw_file(folder / "model.safetensors", {"a": _entry(0, 1, dtype="F4")}, bytes(1))
    with pytest.raises(CheckpointError, match="F4"):
        KIND.open(folder)


SOUND = save({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.int8)}, {"format": "pt"})


def _open(tmp_path_factory, data):
    """Open a folder with this file: how long it took and what it held, None if it was refused."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(data)
    start = time.monotonic()
    try:
        reader = open_checkpoint(folder)[1]
        found = {name: reader.read(name).shape for name in reader.entries}
    except CheckpointError:
        found = None
    assert time.monotonic() - start < 2
    return found


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, len(SOUND) - 1))
def test_truncated_files_are_refused(tmp_path_factory, length):
    assert _open(tmp_path_factory, SOUND[:length]) is None


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, len(SOUND) - 60), flip=st.integers(1, 255), more=st.binary(max_size=3))
def test_damaged_headers_raise_nothing_else(tmp_path_factory, at, flip, more):
    data = bytearray(SOUND)
    data[at] ^= flip
    data[at + 1 : at + 1 + len(more)] = more
    _open(tmp_path_factory, bytes(data))


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_crash(folder):
    save_file({"a": torch.ones(1000, 100)}, folder / "model.safetensors")
    reader = KIND.open(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="when it was opened"):
        reader.read("a")


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_configuration_must_be_there_and_sound(folder, text):
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_other_quantizations_are_named(folder):
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "eetq"}}')
    with pytest.raises(CheckpointError, match="quantized by eetq"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused(folder, name):
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for path in (folder, folder / name):
        with pytest.raises(CheckpointError, match=r"never unpickles.*save_pretrained"):
            open_checkpoint(path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="it holds nothing"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="give its folder"):
        open_checkpoint(tmp_path / "x.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="download the index"):
        open_checkpoint(tmp_path)


RESIDENT = """
import resource, sys, threading, torch
from pathlib import Path
from fewbits.checkpoint import open_checkpoint
_, reader = open_checkpoint(Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def read(first):
    for i in range(first, 64, 2):
        reader.read("w", slice(i, i + 1)).codes.view(torch.int64).amax()
before = peak()
threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
[t.start() for t in threads]; [t.join() for t in threads]
print(peak() - before)
"""


def test_resident_memory_does_not_grow_with_the_file(folder):
    """256 MiB in rows of 4 MiB, read by two threads: two rows at a time are resident, and torch's own few MiB."""
    save_file({"w": torch.ones(64, 1 << 21, dtype=torch.float16)}, folder / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < (2 * 4 + 40) * 1024


def test_the_shared_models_read_as_the_library_reads_them(shared_models):
    from safetensors.torch import load_file

    for name in ("books", "stories260K", "babyllama"):
        reader = open_checkpoint(shared_models / name)[1]
        expected = load_file(shared_models / name / "model.safetensors")
        assert reader.entries.keys() == expected.keys()
        assert all(torch.equal(reader.read(n).codes, t) for n, t in expected.items())
