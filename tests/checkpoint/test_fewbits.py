"""Our own kind holds every registered format, whole or in slabs, bit for bit."""

from __future__ import annotations

import pytest
import torch
from folders import entries_of, floating, quantized, rows_of, same, write

from fewbits.checkpoint import KINDS, Entry, open_checkpoint
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import FORMATS, Float
from fewbits.formats.minifloat import MxFp4

KIND = KINDS["fewbits"]
SHAPE = (11, 256)


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    made = {f"layers.{i}.weight": quantized(f, torch.randn(SHAPE)) for i, f in enumerate(FORMATS.values())}
    made |= {
        f"kept.{dtype}": floating(torch.randint(0, 2, (3, 5)).to(dtype))
        for dtype in (torch.float64, torch.float8_e4m3fn, torch.int64, torch.int8, torch.uint8, torch.bool)
    }
    made["layers.bf16.weight"] = quantized(FORMATS["int4-g32"].with_scales_in(torch.bfloat16), torch.randn(SHAPE))
    made["layers.row_bf16.weight"] = quantized(FORMATS["int8"].with_scales_in(torch.bfloat16), torch.randn(SHAPE))
    return made | {"scalar": floating(torch.tensor(1.5)), "empty": floating(torch.empty(0, 4))}


@pytest.mark.parametrize("rows", [None, 1, 4])
def test_every_format_comes_back_bit_for_bit(tmp_path, tensors, rows):
    assert {q.format.name for q in tensors.values()} >= FORMATS.keys()
    digests = write(
        KIND, tmp_path / "out", {n: q for n, q in tensors.items() if rows is None or n != "empty"}, rows=rows
    )
    kind, reader = open_checkpoint(tmp_path / "out")
    assert kind is KIND
    assert list(reader.entries) == list(digests)
    for name in reader.entries:
        found = reader.read(name)
        assert found.format.name == tensors[name].format.name
        assert same(found, tensors[name]), name
    assert kind.rehash(tmp_path / "out") == digests


def test_slabs_make_the_same_bytes_as_the_whole(tmp_path, tensors):
    tensors = {name: q for name, q in tensors.items() if name != "empty"}
    digests = [write(KIND, tmp_path / f"out{rows}", tensors, rows=rows) for rows in (None, 1, 3, 100)]
    assert all(d == digests[0] for d in digests)
    files = {(tmp_path / f"out{rows}" / "model.safetensors").read_bytes() for rows in (None, 1, 3, 100)}
    assert len(files) == 1


def test_rows_are_read_alone(tmp_path, tensors):
    write(KIND, tmp_path / "out", tensors)
    reader = KIND.open(tmp_path / "out")
    for name, q in tensors.items():
        if q.format.rowwise and q.shape:
            assert same(reader.read(name, slice(2, 5)), rows_of(q, slice(2, 5))), name


def test_rows_of_a_format_that_shares_params_are_refused(tmp_path):
    write(KIND, tmp_path / "out", {"w": quantized(FORMATS["int4-tensor"], torch.randn(4, 8))})
    with pytest.raises(CheckpointError, match="read it whole"):
        KIND.open(tmp_path / "out").read("w", slice(0, 2))


def test_fused_experts_are_one_entry(tmp_path):
    experts = {"experts": quantized(FORMATS["int4-g32"], torch.randn(3, 4, 64))}
    digests = write(KIND, tmp_path / "whole", experts)
    assert write(KIND, tmp_path / "one_by_one", experts, rows=1) == digests
    assert same(KIND.open(tmp_path / "whole").read("experts"), experts["experts"])


def test_a_format_that_its_name_does_not_describe_is_refused(tmp_path):
    entry = Entry("w", (4, 64), MxFp4(group=16))
    assert "not the format" in KIND.admits(entry)
    with pytest.raises(UnsupportedError, match="not the format"):
        KIND.create(tmp_path / "out", [entry], tmp_path, {})


def test_a_damaged_manifest_is_an_error(tmp_path):
    write(KIND, tmp_path / "out", {"w": quantized(FORMATS["int4"], torch.randn(4, 8))})
    file = tmp_path / "out" / "model.safetensors"
    sound = file.read_bytes()
    for wrong, message in ((b"int9", "int9"), (b"int8", r"has torch.int32 \[4, 2\]"), (b'int"', "damaged")):
        file.write_bytes(sound.replace(b"int4", wrong))
        with pytest.raises(CheckpointError, match=message):
            KIND.open(tmp_path / "out")


def test_writing_reports_its_own_bytes(tmp_path, tensors):
    write(KIND, tmp_path / "out", tensors)
    header = int.from_bytes((tmp_path / "out/model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert size == 8 + header + sum(entry.nbytes for entry in entries_of(tensors))
    assert isinstance(KIND.open(tmp_path / "out").entries["scalar"].format, Float)
