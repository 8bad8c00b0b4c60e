"""Quantized modules: the layer's arithmetic, and what torch does to modules (move, cast, copy, pickle, save)."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from fewbits.errors import UnsupportedError
from fewbits.formats import FORMATS, QTensor
from fewbits.nn import PackedWeight, QuantizedEmbedding, QuantizedLinear, replace

IDS = torch.tensor([[1, 5, 1]])


def quantize(w: torch.Tensor, name: str = "int4-g32") -> QTensor:
    format = FORMATS[name]
    params = format.fit(w)
    return QTensor(format, format.round(w, params), params)


@pytest.fixture
def weight() -> QTensor:
    return quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def tied(weight) -> nn.Module:
    """An embedding and an output layer on one weight."""
    store = PackedWeight.of(weight)
    return nn.Sequential(QuantizedEmbedding(store), QuantizedLinear(store))


def test_linear_equals_torch_on_the_dequantized_weight(weight):
    x, bias = torch.randn(3, 64), torch.randn(8)
    layer = QuantizedLinear(PackedWeight.of(weight), bias)
    assert torch.equal(layer(x), functional.linear(x, weight.dequantize(), bias))


def test_weight_reads_as_the_decoded_matrix_in_the_modules_dtype(weight):
    layer = QuantizedLinear(PackedWeight.of(weight, torch.float16))
    assert torch.equal(layer.weight, weight.dequantize().half())


def test_memory_is_that_of_the_packed_arrays(tied, weight):
    assert sum(b.nbytes for b in tied.buffers()) == weight.nbytes == 8 * 64 // 2 + 8 * 2 * 2
    assert not list(tied.parameters())


@pytest.mark.parametrize("name", ["int8", "int4-g32", "nf4", "fp8-e4m3", "nf4-dq"])
def test_casting_the_model_leaves_scales_as_they_are(name):
    weight = quantize(torch.randn(8, 64), name)
    layer = QuantizedEmbedding(PackedWeight.of(weight)).to(torch.bfloat16)
    assert torch.equal(layer(IDS), weight.dequantize()[IDS].bfloat16())
    assert torch.equal(layer.float()(IDS), weight.dequantize()[IDS])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_stay_tied(tied, clone):
    twin = clone(tied)
    assert torch.equal(twin(IDS), tied(IDS))
    assert twin[0].store is twin[1].store
    assert twin[0].store is not tied[0].store


def test_a_saved_state_dict_restores_the_weight(weight):
    layer, other = (QuantizedLinear(PackedWeight.of(w)) for w in (weight, quantize(torch.randn(8, 64))))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight, layer.weight)
    assert set(layer.state_dict()) == {"store.packed", "store.scale"}


def test_moving_keeps_tied_layers_tied(tied):
    moved = tied.to("meta")
    assert moved[0].store.get_buffer("scale") is moved[1].store.get_buffer("scale")


def test_repr_says_what_the_weight_is(tied):
    text = repr(tied)
    assert "int4-g32, [8, 64], 288 bytes, 4.5 bits per weight" in text
    assert "in_features=64, out_features=8, bias=False" in text


def test_replace_swaps_a_layer_and_keeps_its_bias(weight):
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(64, 8), nn.Embedding(8, 64, padding_idx=2))}).eval()
    bias = model["inner"][0].bias
    replace(model, "inner.0", PackedWeight.of(weight))
    replace(model, "inner.1", PackedWeight.of(weight))
    linear, embedding = model["inner"]
    assert isinstance(linear, QuantizedLinear)
    assert linear.bias is bias
    assert isinstance(embedding, QuantizedEmbedding)
    assert embedding.padding_idx == 2
    assert not linear.training
    x = torch.randn(2, 64)
    assert torch.equal(linear(x), functional.linear(x, weight.dequantize(), bias))


def test_a_subclass_is_refused_by_name(weight):
    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 8

    with pytest.raises(UnsupportedError, match="0 is a Scaled"):
        replace(nn.Sequential(Scaled(8, 64)), "0", PackedWeight.of(weight))
