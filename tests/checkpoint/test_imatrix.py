"""Importance matrices against gguf-py and against bytes by hand."""

from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from fewbits.checkpoint.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from fewbits.errors import CheckpointError, OutputError


def matrices():
    generator = torch.Generator().manual_seed(0)
    return {
        "blk.0.attn_q.weight": torch.rand(64, generator=generator),
        "experts": torch.rand(3, 32, generator=generator),
    }


def test_written_and_read(tmp_path):
    found = ImportanceMatrix(matrices(), 128, 256, ("books-calib.txt",))
    write_imatrix(tmp_path / "a.gguf", found)
    back = read_imatrix(tmp_path / "a.gguf")
    assert (back.chunks, back.chunk, back.datasets) == (128, 256, ("books-calib.txt",))
    assert back.importance.keys() == found.importance.keys()
    for name, means in found.importance.items():
        assert torch.equal(back.importance[name], means)  # the sums are means times a power of two
    with pytest.raises(OutputError, match="exists"):
        write_imatrix(tmp_path / "a.gguf", found)


def test_gguf_py_reads_what_llama_cpp_looks_for(tmp_path):
    found = matrices()
    write_imatrix(tmp_path / "a.gguf", ImportanceMatrix(found, 2, 100))
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.chunk_count").contents() == 2
    tensors = {t.name: t.data for t in reader.tensors}
    assert tensors["experts.in_sum2"].shape == (3, 32)
    assert tensors["experts.counts"].tolist() == [[200.0]] * 3
    assert np.allclose(tensors["experts.in_sum2"] / 200, found["experts"])


def test_an_expert_that_no_token_came_to_counts_alike(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a", "b"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_tensor("t.in_sum2", np.array([[8.0, 4.0], [0.0, 0.0]], dtype=np.float32))
    writer.add_tensor("t.counts", np.array([[4.0], [0.0]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_imatrix(tmp_path / "a.gguf")
    assert found.importance["t"].tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert (found.chunks, found.chunk, found.datasets) == (7, 0, ("a", "b"))


def test_the_older_kind_by_hand(tmp_path):
    """One entry of three calls, whose values are the mean times 3, five chunks of `x.txt`."""
    data = struct.pack("<i", 1) + struct.pack("<i", 3) + b"abc" + struct.pack("<ii2f", 3, 2, 6.0, 1.5)
    (tmp_path / "old.dat").write_bytes(data)
    assert read_imatrix(tmp_path / "old.dat").importance["abc"].tolist() == [2.0, 0.5]
    (tmp_path / "a.dat").write_bytes(data + struct.pack("<ii", 5, 5) + b"x.txt")
    found = read_imatrix(tmp_path / "a.dat")
    assert found.importance["abc"].tolist() == [2.0, 0.5]
    assert (found.chunks, found.datasets) == (5, ("x.txt",))
    for end in range(len(data)):
        (tmp_path / "cut.dat").write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"no importance matrix, or damaged"):
            read_imatrix(tmp_path / "cut.dat")


def test_other_files_are_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="must be 'imatrix'"):
        read_imatrix(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_imatrix(tmp_path / "missing.dat")
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(CheckpointError, match="NaN, Inf or negative"):
            write_imatrix(tmp_path / "bad.gguf", ImportanceMatrix({"t": torch.tensor([bad])}, 1, 1))
        (tmp_path / "bad.dat").write_bytes(struct.pack("<ii", 1, 1) + b"t" + struct.pack("<iif", 1, 1, bad))
        with pytest.raises(CheckpointError, match="NaN, Inf or negative"):
            read_imatrix(tmp_path / "bad.dat")
    write_imatrix(tmp_path / "whole.gguf", ImportanceMatrix(matrices(), 1, 1))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        read_imatrix(tmp_path / "cut.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.dat", "cut.gguf", "model.gguf", "whole.gguf"]


@given(st.binary(max_size=200))
def test_any_bytes_are_an_importance_matrix_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.dat"
    path.write_bytes(data)
    with suppress(CheckpointError):
        read_imatrix(path)
