"""Rotation: the matrices are what they should be, the model predicts what it did, and outliers are gone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from blocks import FAMILIES, deviation, logits
from safetensors.torch import save_file
from tiny import export, read_weights, save_model
from transformers import AutoModelForCausalLM

from fewbits.checkpoint import open_checkpoint
from fewbits.engine import LayeredModel, load
from fewbits.errors import UnsupportedError
from fewbits.formats import format_named
from fewbits.methods.rotate import Rotate, Rotation
from fewbits.models import Flow
from fewbits.pipeline._rotated import RotatedReader

IDS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
FLOAT32 = 1e-4  # see test_links.py
ROTATABLE = [kind for kind in FAMILIES if kind not in ("gemma2", "gemma3_text")]


def rotated(folder: Path) -> RotatedReader:
    return RotatedReader(open_checkpoint(folder)[1], Rotate())


def written(reader: RotatedReader, out: Path) -> Path:
    """The rotated model as a folder of its own."""
    out.mkdir()
    save_file({name: reader.read(name).codes.contiguous() for name in reader.entries}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(reader.config))
    return out


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 64, 84, 96, 512, 768, 896])
def test_hadamard(size: int) -> None:
    """Orthogonal, and every entry is ±1/√n."""
    r = Rotation.random(size, 0).columns(torch.eye(size)).double()
    assert torch.allclose(r.abs(), torch.full_like(r, size**-0.5), rtol=2**-23)
    assert float((r @ r.T - torch.eye(size)).abs().max()) < 4 * 2**-24 * size**0.5  # n products, rounding at random


@pytest.mark.parametrize("size", [3584, 4096, 5120, 8192, 14336])
def test_large_sizes_are_products_of_small_hadamard_matrices(size: int) -> None:
    factors = Rotation.random(size, 0).factors
    assert math.prod(len(factor) for factor in factors) == size
    for factor in factors:
        assert len(factor) <= 256
        assert torch.allclose(factor.abs(), torch.full_like(factor, len(factor) ** -0.5))
        assert torch.allclose(factor @ factor.T, torch.eye(len(factor), dtype=torch.float64))


@pytest.mark.parametrize("size", [6, 7, 44 * 23, 172])
def test_sizes_without_a_hadamard_matrix_here_are_orthogonal_all_the_same(size: int) -> None:
    r = Rotation.random(size, 0).columns(torch.eye(size)).double()
    assert float((r @ r.T - torch.eye(size)).abs().max()) < 4 * 2**-24 * size**0.5


def test_a_small_one_by_hand() -> None:
    """H₄ with signs (+ − − +), in both directions, and two heads beside each other."""
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    h = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    r = Rotation(signs, (h.double(),))
    matrix = torch.tensor([[1.0, 1, 1, 1], [-1, 1, -1, 1], [-1, -1, 1, 1], [1, -1, -1, 1]]) / 2
    w = torch.arange(8.0).reshape(2, 4) ** 2
    assert torch.equal(r.columns(w), w @ matrix)
    assert torch.equal(r.rows(w.T), matrix.T @ w.T)
    assert torch.equal(r.columns(torch.cat([w, -w], 1)), torch.cat([w @ matrix, -w @ matrix], 1))


@pytest.mark.parametrize("kind", ROTATABLE)
def test_no_prediction_changes(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / kind, kind, **FAMILIES[kind])
    reader = rotated(tmp_path / kind)
    twin = AutoModelForCausalLM.from_pretrained(written(reader, tmp_path / "rotated"), dtype=torch.float32)
    assert deviation(logits(twin.eval(), IDS), logits(model, IDS)) < FLOAT32
    unchanged = [name for name, w in read_weights(tmp_path / kind).items() if torch.equal(reader.read(name).codes, w)]
    assert all("bias" in name or "q_norm" in name or "k_norm" in name for name in unchanged)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_tied_embeddings_come_apart(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / kind, kind, tie_word_embeddings=True)
    assert "lm_head.weight" not in read_weights(tmp_path / kind)
    reader = rotated(tmp_path / kind)
    assert reader.config["tie_word_embeddings"] is False
    assert reader.entries["lm_head.weight"].shape == reader.entries["model.embed_tokens.weight"].shape
    assert deviation(logits(load(written(reader, tmp_path / "rotated")), IDS), logits(model, IDS)) < FLOAT32


def test_gguf_computes_the_same(tmp_path: Path) -> None:
    """Nothing is left to do at run time: an engine that has never heard of rotations gives the same predictions."""
    model = save_model(tmp_path / "llama", "llama", tie_word_embeddings=True)
    folder = written(rotated(tmp_path / "llama"), tmp_path / "rotated")
    for file in (tmp_path / "llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    export(folder, tmp_path / "rotated.gguf")
    assert deviation(logits(load(tmp_path / "rotated.gguf"), IDS), logits(model, IDS)) < FLOAT32
    llama_cpp = pytest.importorskip("llama_cpp")
    engine = llama_cpp.Llama(str(tmp_path / "rotated.gguf"), n_ctx=32, n_batch=32, logits_all=True, verbose=False)
    engine.eval(IDS[0].tolist())
    found = torch.tensor(engine.scores[: IDS.shape[1]]).double()
    engine.close()
    assert deviation(found, logits(model, IDS)[0]) < 1e-2  # llama.cpp keeps keys and values in FP16


@torch.no_grad()
def test_layers_are_read_rotated(tmp_path: Path) -> None:
    """The overlay is a reader like any other: a layer at a time, hidden states of the same length in another basis."""
    save_model(tmp_path / "qwen2", "qwen2", tie_word_embeddings=True)
    plain, twin = LayeredModel(open_checkpoint(tmp_path / "qwen2")[1]), LayeredModel(rotated(tmp_path / "qwen2"))
    x, y = plain.embed(IDS), twin.embed(IDS)
    for index in range(len(plain.layers)):
        plain.load(index)
        twin.load(index)
        x, y = plain.run(index, x), twin.run(index, y)
        assert deviation(y.norm(dim=-1).double(), x.norm(dim=-1).double()) < FLOAT32
        assert deviation(y.double(), x.double()) > 0.5  # another basis
    assert deviation(twin.logits(y).double(), plain.logits(x).double()) < FLOAT32


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    save_model(tmp_path / "qwen2", "qwen2")
    reader, other = rotated(tmp_path / "qwen2"), rotated(tmp_path / "qwen2")
    for name, entry in reader.entries.items():
        slabs = [reader.read(name, slice(i, min(i + 5, entry.shape[0]))).codes for i in range(0, entry.shape[0], 5)]
        assert torch.allclose(torch.cat(slabs), other.read(name).codes, rtol=2**-22, atol=1e-7), name


def test_fused_experts_are_rotated_one_by_one() -> None:
    rotations, w = Rotate().rotations(16, 4), torch.randn(3, 16, 20)
    down, gate_up = rotations.rotated(w, Flow("writes")), rotations.rotated(w.mT, Flow("reads"))
    for expert in range(3):
        assert torch.equal(down[expert], rotations.rotated(w[expert], Flow("writes")))
        assert torch.equal(gate_up[expert], rotations.rotated(w[expert].mT, Flow("reads")))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_norms_behind_a_layer_have_no_rotated_twin(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path / kind, kind, **FAMILIES[kind])
    with pytest.raises(UnsupportedError, match="scales single channels"):
        rotated(tmp_path / kind)


def test_planted_outliers_spread_out(tmp_path: Path) -> None:
    """A channel of the norm shrinks by 50, the columns behind it grow by 50: INT4 loses all else in their groups.

    With one weight in 16 of a group 50 times larger the step grows by about 50 / 2.5, and the others' error by its
    square; a rotation makes all weights alike again, so that the error relative to the largest output is that of
    normal weights. A factor of 4 in the relative error is far below what is lost and far above chance.
    """
    save_model(tmp_path / "llama", "llama")
    weights = read_weights(tmp_path / "llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights["model.layers.0.input_layernorm.weight"] = torch.ones(32)
    weights["model.layers.0.input_layernorm.weight"][[3, 20]] /= 50
    for projection in "qkv":
        weights[f"model.layers.0.self_attn.{projection}_proj.weight"][:, [3, 20]] *= 50
    save_file(weights, tmp_path / "llama" / "model.safetensors")
    format, gamma = format_named("int4-g16"), weights["model.layers.0.input_layernorm.weight"]

    def error(w: torch.Tensor, gamma: torch.Tensor) -> float:
        params = format.fit(w, search=True)
        rounded = format.decode(format.round(w, params), params)
        return float(((rounded - w) * gamma).norm() / (w * gamma).norm())

    plain = error(weights[name], gamma)
    assert error(rotated(tmp_path / "llama").read(name).codes, torch.ones(32)) < plain / 4
