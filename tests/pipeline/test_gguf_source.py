"""GGUF files as what is quantized: the same bytes as from the folder that they were made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from tiny import TEXT, save_model
from transformers import AutoTokenizer

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.checkpoint.gguf_parts import split
from fewbits.errors import UnsupportedError
from fewbits.evals import Windows, calibration_windows
from fewbits.pipeline._source import open_source

IDS = torch.randint(0, 200, (8, 16), generator=torch.Generator().manual_seed(0))
DRAWN = fewbits.Calibration(text=Windows(IDS, "drawn by lot"), windows=6, length=16, held_out=2, limit=100.0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
}


def made(folder: Path, kind: str, **settings: object) -> tuple[Path, Path]:
    """A random model's folder and its GGUF file, both in FP32."""
    save_model(folder / "model", kind, hidden_size=64, intermediate_size=96, **MODELS[kind] | settings)
    fewbits.quantize(folder / "model", folder / "whole.gguf", format="fp32", prove=False)
    return folder / "model", folder / "whole.gguf"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("source"), "llama")


@pytest.mark.parametrize("kind", MODELS)
def test_the_file_is_the_folder_it_was_made_of(tmp_path, kind):
    """Every parameter by its name, whole and by rows that cut heads; and the same file comes of both."""
    folder, file = made(tmp_path, kind)
    original, restored = open_source(folder), open_source(file)
    tied = {"lm_head.weight"} if original.config["tie_word_embeddings"] else set()
    assert restored.entries.keys() == original.entries.keys() - tied
    for name, entry in restored.entries.items():
        expected = original.read(name).codes
        assert entry.shape == tuple(expected.shape)
        found = restored.read(name).codes
        # Of a norm in FP32 with 1 added the last bits are gone: half a step of 1 + w, at most 2^-23 up to |w| < 1.
        offset = "norm" in name and kind == "gemma3_text"
        assert torch.allclose(found, expected, rtol=0, atol=2**-23) if offset else torch.equal(found, expected)
        assert torch.equal(restored.read(name, slice(3, 21)).codes, found[3:21])
    for source, out in ((folder, "a"), (file, "b")):
        fewbits.quantize(source, tmp_path / f"{out}.gguf", format="q4_0", threads=2)
    left, right = (GGUFReader(tmp_path / f"{out}.gguf") for out in "ab")
    assert list(left.fields) == list(right.fields)
    for name, field in left.fields.items():
        twin = right.fields[name]
        if name != "general.name":
            assert (field.types, field.contents()) == (twin.types, twin.contents())
    for a, b in zip(left.tensors, right.tensors, strict=True):
        assert (a.name, a.tensor_type, bytes(a.data)) == (b.name, b.tensor_type, bytes(b.data))


def test_gptq_makes_the_same_bytes_of_both(tmp_path):
    """Of a model without rotary factors: those come back from the file rounded, and a code may turn on that."""
    options = {"format": "q4_0", "method": "gptq", "calibration": DRAWN, "threads": 2}
    for source, out in zip(made(tmp_path, "mistral"), "ab", strict=True):
        fewbits.quantize(source, tmp_path / f"{out}.gguf", **options)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_rotated_files_are_those_of_the_folder(tmp_path, llama):
    for source, out in zip(llama, "ab", strict=True):
        fewbits.quantize(source, tmp_path / f"{out}.gguf", format="q8_0", method="rotate+rtn", threads=2)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_metadata_and_extra_tensors_are_carried_over(tmp_path, llama):
    """By gguf-py: a copy of the file with more keys, of every type, none of which fewbits would write."""
    _, file = llama
    theirs, path = GGUFReader(file), tmp_path / "more.gguf"
    writer = GGUFWriter(path, "llama")
    skipped = ("GGUF.", "general.architecture", "general.alignment")
    for name, field in theirs.fields.items():
        if not name.startswith(skipped):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    writer.add_custom_alignment(64)
    writer.add_uint8("my.u8", 200)
    writer.add_int64("my.i64", -(1 << 40))
    writer.add_float64("my.f64", 0.1)
    writer.add_array("my.bools", [True, False])
    writer.add_array("general.tags", ["a", "ünï"])
    factors = np.linspace(1, 3, 8).astype(np.float32)
    for tensor in theirs.tensors:
        writer.add_tensor(tensor.name, factors if tensor.name == "rope_freqs.weight" else np.array(tensor.data))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    fewbits.quantize(path, tmp_path / "out.gguf", format="q8_0", threads=2)
    before, after = GGUFReader(path), GGUFReader(tmp_path / "out.gguf")
    owned = ("GGUF.", "general.file_type", "general.quantization_version")
    kept = {name: field for name, field in before.fields.items() if not name.startswith(owned)}
    assert kept.keys() >= {"my.u8", "my.i64", "my.f64", "my.bools", "general.tags", "general.alignment"}
    for name, field in kept.items():
        assert (after.fields[name].types, after.fields[name].contents()) == (field.types, field.contents()), name
    assert after.fields["general.file_type"].contents() == 7
    carried = next(tensor for tensor in after.tensors if tensor.name == "rope_freqs.weight")
    assert np.array_equal(carried.data, factors)
    ledger = json.loads((tmp_path / "out.fewbits.json").read_text())["tensors"]
    line = next(line for line in ledger if line["name"] == "rope_freqs.weight")
    assert line["source"] == "rope_freqs.weight"
    assert fewbits.verify(tmp_path / "out.gguf", path, logits=False).passed


def test_parts_are_a_source_too(tmp_path, llama):
    _, file = llama
    parts = split(file, tmp_path / "x", max_tensors=5)
    for source, out in ((file, "a"), (parts[0], "b")):
        fewbits.quantize(source, tmp_path / f"{out}.gguf", format="q4_0", threads=2)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_sources_of_16_bits_give_the_blocks_of_gguf_py(tmp_path, llama, format):
    folder, _ = llama
    half, out = tmp_path / "half.gguf", tmp_path / "out.gguf"
    fewbits.quantize(folder, half, format=format, threads=2)
    fewbits.quantize(half, out, format="q8_0", method="rtn-plain", threads=2)
    for before, after in zip(GGUFReader(half).tensors, GGUFReader(out).tensors, strict=True):
        numbers = dequantize(before.data, before.tensor_type).astype(np.float32)
        assert np.array_equal(quantize(numbers, after.tensor_type), after.data), before.name


def test_what_cannot_be_is_said(tmp_path, llama):
    _, file = llama
    fewbits.quantize(file, tmp_path / "q4.gguf", format="q4_0", threads=2)
    with pytest.raises(UnsupportedError, match=r"quantized already \(token_embd\.weight is q\d_\w+\)"):
        fewbits.quantize(tmp_path / "q4.gguf", tmp_path / "x.gguf", format="q4_0")
    with pytest.raises(UnsupportedError, match="leave --pretokenizer out"):
        fewbits.quantize(file, tmp_path / "x.gguf", format="q4_0", pretokenizer="qwen2")
    nameless = tmp_path / "nameless.gguf"
    nameless.write_bytes(file.read_bytes().replace(b"gpt-2", b"gpt-9"))
    with pytest.raises(UnsupportedError, match="pre-tokenizer 'gpt-9'"):
        fewbits.quantize(nameless, tmp_path / "folder", format="int4-g32")
    assert not (tmp_path / "folder").exists()
    assert not (tmp_path / "x.gguf").exists()


def test_folders_are_those_of_the_folder(tmp_path):
    """Weights byte by byte; transformers reads the same tokens with the tokenizer and computes the same numbers."""
    folder, file = made(tmp_path, "qwen3")
    outs = [tmp_path / "a", tmp_path / "b"]
    for source, out in zip((folder, file), outs, strict=True):
        fewbits.quantize(source, out, format="int4-g32", threads=2)
    names = [{path.name for path in out.iterdir()} for out in outs]
    assert names[1] == names[0]
    (_, a), (_, b) = (open_checkpoint(out) for out in outs)
    assert a.entries == b.entries
    assert all(a.digests(name) == b.digests(name) for name in a.entries)
    left, right = (AutoTokenizer.from_pretrained(out, local_files_only=True) for out in outs)
    assert left(TEXT).input_ids == right(TEXT).input_ids
    assert (left.bos_token_id, left.eos_token_id) == (right.bos_token_id, right.eos_token_id)
    x, y = (fewbits.load(out)(IDS).logits for out in outs)
    assert torch.equal(x, y)


@pytest.mark.parametrize("table", [False, True])
def test_text_is_read_as_with_the_folders_tokenizer(tmp_path, llama, table):
    text = tmp_path / ("text.jsonl" if table else "text.txt")
    text.write_text("\n".join(json.dumps({"text": TEXT}) for _ in range(9)) if table else TEXT * 9)
    windows = [calibration_windows(text, source, 6, 32) for source in llama]
    assert torch.equal(windows[0].ids, windows[1].ids)
    calibration = fewbits.Calibration(text=text, windows=4, length=16, held_out=1, limit=100.0)
    for source, out in zip(llama, "ab", strict=True):
        fewbits.quantize(
            source, tmp_path / f"{out}.gguf", format="q4_0", method="gptq", calibration=calibration, threads=2
        )
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
