"""Models that only transformers has, their quantized layers in tiles: same predictions, no weight held twice."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_model
from torch import nn

import fewbits
from fewbits.engine import load, tiled_layers
from fewbits.engine.tiled_layers import tile_layers
from fewbits.engine.transformers_runner import TransformersRunner
from fewbits.nn import PackedWeight, QuantizedEmbedding, QuantizedLinear, TiledEmbedding, TiledLinear, W8A8Linear
from fewbits.runtime.compiled import compiled

needs_kernels = pytest.mark.skipif(compiled() is None, reason="the kernels were not compiled")
IDS = torch.arange(5, 69).view(2, 32)
SHARP = 4.0
"""Factor of the last norm's weights, after which the likeliest of 400 tokens has a probability of about a fifth."""


def quantized(folder: Path, model_type: str, settings: dict, **how) -> Path:
    model = save_model(folder / "m", model_type, hidden_size=128, **settings)
    with torch.no_grad():
        last = [p for name, p in model.named_parameters() if "norm" in name and p.dim() == 1][-2:]
        for parameter in last:
            parameter.mul_(SHARP)
    model.save_pretrained(folder / "m")
    fewbits.quantize(folder / "m", folder / "q", format="int4-g32", prove=False, **how)
    return folder / "q"


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL divergence of predictions, in nats."""
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def neox(tmp_path: Path) -> Path:
    return quantized(tmp_path, "gpt_neox", {"intermediate_size": 256})


@needs_kernels
@torch.no_grad()
def test_predictions_are_those_of_decoded_weights(neox):
    """transformers' forward on the decoded weights. Half of 1e-3, which is what all kernels have to keep within."""
    runner = TransformersRunner(neox, slots=1, reason="a test")
    decoded = load(neox, packed=False)(IDS).logits
    assert decoded.softmax(-1).amax(-1).mean() > 0.1  # nothing that anything would agree with
    rows = np.arange(32, dtype=np.int32)
    ours = [runner.forward(ids.numpy().astype(np.int32), np.zeros_like(rows), rows, rows) for ids in IDS]
    found = divergence(torch.from_numpy(np.stack(ours)), decoded)
    assert 0 < found < 5e-4
    other = load(neox, packed=False)
    other.gpt_neox.layers[0].mlp.dense_4h_to_h.weight[:16].zero_()  # an eighth of one matrix: the measure can fail
    assert divergence(other(IDS).logits, decoded) > 1e-3


@needs_kernels
def test_packed_arrays_are_gone_one_by_one(neox, monkeypatch):
    """When a weight is tiled, at most its own packed arrays and those of later ones are there."""
    model = load(neox)
    stores = [weakref.ref(module) for module in model.modules() if isinstance(module, PackedWeight)]
    alive: list[int] = []
    tiled = tiled_layers.tiled_packed

    def counting(packed):
        gc.collect()
        alive.append(sum(ref() is not None for ref in stores))
        return tiled(packed)

    monkeypatch.setattr(tiled_layers, "tiled_packed", counting)
    tile_layers(model)
    gc.collect()
    assert len(stores) == 8  # four matrices of two layers
    assert alive == list(range(8, 0, -1))
    assert all(ref() is None for ref in stores)
    assert not kinds(model, QuantizedLinear)
    assert len(kinds(model, TiledLinear)) == 8


@needs_kernels
@torch.no_grad()
def test_a_tied_projection_shares_its_tiles_with_the_embedding(tmp_path):
    path = quantized(
        tmp_path,
        "opt",
        {"ffn_dim": 256, "word_embed_proj_dim": 128, "tie_word_embeddings": True},
        vocabulary="int8-g32",
        kind="fewbits",
    )
    model = load(path)
    expected = load(path, packed=False)(IDS).logits
    tile_layers(model)
    assert isinstance(model.lm_head, TiledLinear)
    assert isinstance(model.model.decoder.embed_tokens, TiledEmbedding)
    assert model.lm_head.matrix is model.model.decoder.embed_tokens.matrix
    assert not kinds(model, PackedWeight)
    assert 0 < divergence(model(IDS).logits, expected) < 5e-4


@needs_kernels
@torch.no_grad()
def test_an_embedding_of_its_own_stays_packed(tmp_path):
    path = quantized(tmp_path, "gpt_neox", {"intermediate_size": 256}, vocabulary="int8-g32", kind="fewbits")
    model = load(path)
    tile_layers(model)
    assert kinds(model, QuantizedEmbedding) == ["gpt_neox.embed_in"]
    assert isinstance(model.get_output_embeddings(), TiledLinear)
    assert divergence(model(IDS).logits, load(path, packed=False)(IDS).logits) < 5e-4


@needs_kernels
@torch.no_grad()
def test_fused_experts_are_left_alone(tmp_path):
    path = quantized(tmp_path, "olmoe", {"intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2})
    model, decoded = load(path), load(path, packed=False)
    tile_layers(model)
    experts = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    assert len(experts) == 4
    assert all(torch.equal(p, decoded.get_parameter(name)) for name, p in experts.items())
    assert len(kinds(model, TiledLinear)) == 8


@needs_kernels
def test_layers_that_round_their_inputs_themselves_stay(tmp_path):
    save_model(tmp_path / "m", "gpt_neox", hidden_size=128, intermediate_size=256)
    fewbits.quantize(tmp_path / "m", tmp_path / "q", format="int8", inputs="int8-token", prove=False)
    model = load(tmp_path / "q")
    before = kinds(model, W8A8Linear)
    tile_layers(model)
    assert before
    assert kinds(model, W8A8Linear) == before


def test_without_kernels_layers_stay_packed(neox, monkeypatch):
    monkeypatch.setattr(tiled_layers, "compiled", lambda: None)
    model = load(neox)
    tile_layers(model)
    assert len(kinds(model, QuantizedLinear)) == 8
    assert not kinds(model, TiledLinear)
