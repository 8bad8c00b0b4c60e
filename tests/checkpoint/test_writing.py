"""Whatever carries the final name is whole; whatever fails leaves nothing, or a folder that says it is partial."""

# ruff: noqa: PT012 — the writer is a context manager itself, and it is what must see the error
from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from folders import CONFIG, entries_of, floating, quantized, rows_of, write
from safetensors.torch import load_file

from fewbits.checkpoint import KINDS, Entry, _writer, open_checkpoint
from fewbits.errors import LedgerError, OutputError, UnsupportedError
from fewbits.formats import FORMATS, Float

FLOAT = KINDS["huggingface"]
W = floating(torch.arange(12.0).view(4, 3))


def begin(path, tensors, kind=FLOAT):
    return kind.create(path, entries_of(tensors), path.parent, CONFIG)


def test_the_library_reads_what_was_written(tmp_path):
    tensors = {"b": floating(torch.tensor([1], dtype=torch.int8)), "a": W, "h": floating(torch.ones(3).half())}
    digests = write(FLOAT, tmp_path / "deep" / "out", tensors, rows=1)
    found = load_file(tmp_path / "deep/out/model.safetensors")
    assert {n: t.tolist() for n, t in found.items()} == {n: q.codes.tolist() for n, q in tensors.items()}
    assert FLOAT.rehash(tmp_path / "deep/out") == digests
    assert json.loads((tmp_path / "deep/out/fewbits.json").read_text()) == {"kind": "huggingface"}
    assert json.loads((tmp_path / "deep/out/config.json").read_text()) == CONFIG


def test_every_array_is_aligned(tmp_path):
    tensors = {"b": floating(torch.zeros(3, dtype=torch.int8)), "d": floating(torch.ones(3).double()), "f": W}
    write(FLOAT, tmp_path / "out", tensors)
    header = int.from_bytes((tmp_path / "out/model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0
    arrays = open_checkpoint(tmp_path / "out")[1]._folder.arrays.values()
    assert all(a.offset % a.dtype.itemsize == 0 for a in arrays)


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(_writer, "SHARD", 100)
    tensors = {f"t{i}": floating(torch.full((2, 5), float(i))) for i in range(5)}
    write(FLOAT, tmp_path / "out", tensors)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {f"t{i}": names[i // 2] for i in range(5)}
    reader = open_checkpoint(tmp_path / "out")[1]
    assert all(torch.equal(reader.read(n).codes, q.codes) for n, q in tensors.items())


def test_two_threads_write_two_entries(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": quantized(FORMATS["int4-g32"], torch.randn(64, 64)) for i in range(8)}
    kind = KINDS["fewbits"]
    with begin(tmp_path / "out", tensors, kind) as writer:

        def work(names):
            for name in names:
                for row in range(64):
                    writer.write(name, rows_of(tensors[name], slice(row, row + 1)))

        names = list(tensors)
        threads = [threading.Thread(target=work, args=(names[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.commit({})
    assert writer.digests == write(kind, tmp_path / "alone", tensors)
    assert kind.rehash(tmp_path / "out") == writer.digests


def test_companions_go_along_and_weights_do_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    along = [
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "generation_config.json",
    ]
    stay = ["README.md", "model.bin", "x.gguf", "model.safetensors.index.json", "modeling_x.py", "fewbits.json", "a.pt"]
    for name in along + stay:
        (source / name).write_text("{}")
    (source / "config.json").write_text('{"old": 1}')
    write(FLOAT, tmp_path / "out", {"w": W}, source=source)
    made = {"config.json", "fewbits.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*along, *made}
    assert (tmp_path / "out/fewbits.json").read_text() != "{}"
    write(FLOAT, tmp_path / "code", {"w": W}, source=source, config=CONFIG | {"auto_map": {}})
    assert (tmp_path / "code/modeling_x.py").exists()


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text(""), lambda p: p.symlink_to("nowhere")])
def test_existing_output_is_refused_and_left_alone(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        begin(tmp_path / "out", {"w": W})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputError, match="exists already"), begin(tmp_path / "out", {"w": W}) as writer:
        writer.write("w", W)
        (tmp_path / "out").mkdir()
        writer.commit({})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_abort_leaves_nothing(tmp_path):
    writer = begin(tmp_path / "out", {"w": W})
    assert [p.name.partition(".partial-")[0] for p in tmp_path.iterdir()] == ["out"]
    writer.write("w", W)
    writer.abort()
    writer.abort()
    assert not list(tmp_path.iterdir())
    with pytest.raises(LedgerError):
        writer.write("w", W)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), begin(tmp_path / "out", {"w": W}) as writer:
        writer.write("w", rows_of(W, slice(0, 2)))
        raise error
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_only_a_partial_folder(tmp_path):
    code = (
        "import os, signal, sys, torch\nfrom pathlib import Path\nfrom fewbits.checkpoint import KINDS, Entry\n"
        "from fewbits.formats import Float, QTensor\nq = QTensor(Float(torch.float32), torch.ones(4, 3), {})\n"
        "entry = Entry('w', (4, 3), q.format)\npath = Path(sys.argv[1])\n"
        "writer = KINDS['huggingface'].create(path, [entry], path.parent, {})\nwriter.write('w', q)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.partial-")
    assert not (left / "fewbits.json").exists()


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, _full)
    with pytest.raises(OutputError, match=r"No space left.*make room"), begin(tmp_path / "out", {"w": W}) as writer:
        writer.write("w", W)
        writer.commit({})
    assert not list(tmp_path.iterdir())


def test_file_systems_that_cannot_allocate_ahead(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(FLOAT, tmp_path / "out", {"w": W})
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["w"], W.codes)


def test_too_little_room_is_found_before_anything_is_written(tmp_path):
    entry = Entry("w", (1 << 30, 1 << 20), Float(torch.float32))
    with pytest.raises(OutputError, match=r"needs 4503599\.\d+ GB and .* GB are free"):
        FLOAT.create(tmp_path / "out", [entry], tmp_path, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([rows_of(W, slice(0, 3))], "first of them 'w'"),
        ([], "1 of 1 entries are not written"),
        ([W, rows_of(W, slice(0, 1))], "cannot follow"),
        ([floating(torch.ones(5, 3))], "cannot follow"),
        ([floating(torch.ones(4, 2))], "cannot follow"),
        ([floating(torch.ones(4, 3).half())], "cannot follow"),
    ],
)
def test_rows_that_do_not_add_up(tmp_path, parts, message):
    with pytest.raises(LedgerError, match=message), begin(tmp_path / "out", {"w": W}) as writer:
        for part in parts:
            writer.write("w", part)
        writer.commit({})
    assert not list(tmp_path.iterdir())


def test_undeclared_and_twice_declared_entries(tmp_path):
    with pytest.raises(LedgerError, match="not declared"), begin(tmp_path / "out", {"w": W}) as writer:
        writer.write("v", W)
    with pytest.raises(LedgerError, match="declared twice"):
        FLOAT.create(tmp_path / "out", entries_of({"w": W}) * 2, tmp_path, {})
    entries = [Entry("m.weight", (2, 4), FORMATS["int8"]), Entry("m.weight_scale", (2, 1), W.format)]
    with pytest.raises(LedgerError, match=r"both write an array 'm\.weight_scale'"):
        KINDS["compressed-tensors"].create(tmp_path / "out", entries, tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_float_folders_hold_floats_only(tmp_path):
    with pytest.raises(UnsupportedError, match="floating point only, not int4"):
        begin(tmp_path / "out", {"w": quantized(FORMATS["int4"], torch.randn(2, 8))})
    assert not list(tmp_path.iterdir())
