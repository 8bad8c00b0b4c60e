"""Linear layers that round their input: the arithmetic, and what torch does to modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fewbits.errors import FormatError, UnsupportedError
from fewbits.formats import ACTIVATIONS, FORMATS, QTensor
from fewbits.nn import W8A8Linear, replace_w8a8

X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
INT8 = ["int8", "int8-tensor", "int8-asym", "int8-asym-tensor", "int4", "int3-asym"]
PAIRS = [(w, f"int8-{s}") for w in INT8 for s in ("token", "tensor", "static")]
PAIRS += [(w, f"fp8-{s}") for w in ("fp8-e4m3", "fp8-e4m3-tensor") for s in ("token", "tensor", "static")]


def layer_of(weight="int8", inputs="int8-token", bias=True, search=False):
    torch.manual_seed(1)
    w, format, chosen = torch.randn(24, 64) + 0.3, FORMATS[weight], ACTIVATIONS[inputs]
    params = format.fit(w, search=search)
    q = QTensor(format, format.round(w, params), params)
    scale = chosen.scale_of(X.abs().amax() / 2) if chosen.static else None
    return W8A8Linear(q, chosen, scale, torch.randn(24) if bias else None), q, scale


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("weight", "inputs"), PAIRS)
def test_it_multiplies_what_both_formats_decode_to(weight, inputs, search):
    layer, q, scale = layer_of(weight, inputs, search=search)
    x = layer.inputs.dequantize(*layer.inputs.quantize(X, scale)).double()
    w, bias = q.dequantize().double(), layer.bias.double()
    # products of codes are exact, or float32 sums (FP8): K roundings at most, then a few for scales and bias
    bound = (64 + 8) * 2.0**-24 * (x.abs() @ w.abs().T + bias.abs())
    found = layer(X)
    assert found.dtype == torch.float32
    assert ((found - (x @ w.T + bias)).abs() <= bound).all()
    assert torch.equal(layer.weight, q.dequantize())


@pytest.mark.parametrize("inputs", ["int8-static", "fp8-static"])
def test_casting_the_model_leaves_scales_and_codes_as_they_are(inputs):
    weight = "int8" if inputs.startswith("int8") else "fp8-e4m3"
    layer, q, _ = layer_of(weight, inputs, bias=False)
    expected = layer(X.bfloat16().float())
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(X.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half(X.bfloat16()), expected.bfloat16())
    assert torch.equal(half.weight, q.dequantize().bfloat16())
    assert torch.equal(half.float()(X.bfloat16().float()), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(clone):
    layer, *_ = layer_of("int8-asym", "int8-static")
    assert torch.equal(clone(layer)(X), layer(X))


def test_memory_is_a_byte_a_weight():
    layer, *_ = layer_of("int8", "int8-token", bias=False)
    assert sum(b.nbytes for b in layer.buffers()) == 24 * 64 + 24 * 4
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"codes", "scale"}


def test_one_token_and_any_number_of_dimensions():
    layer, *_ = layer_of("int8", "int8-token")
    assert torch.equal(layer(X[0, 0]), layer(X)[0, 0])
    assert torch.equal(layer(X[:1, :1]), layer(X)[:1, :1])


def test_replace_swaps_a_linear_and_keeps_its_bias():
    layer, *_ = layer_of(bias=False)
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(64, 24), nn.Embedding(24, 64))}).eval()
    bias = model["inner"][0].bias
    replace_w8a8(model, "inner.0", layer)
    assert model["inner"][0] is layer
    assert layer.bias is bias
    assert not layer.training
    assert "int8 weights, int8-token inputs" in repr(model)
    with pytest.raises(UnsupportedError, match=r"inner\.1 is a Embedding; only a plain Linear"):
        replace_w8a8(model, "inner.1", layer)


def test_what_cannot_be_multiplied_is_refused():
    _, q, _ = layer_of("int8")
    with pytest.raises(FormatError, match="multiplied by FP8"):
        W8A8Linear(q, ACTIVATIONS["fp8-token"])
    with pytest.raises(FormatError, match="a static scale is needed"):
        W8A8Linear(q, ACTIVATIONS["int8-static"])
    with pytest.raises(FormatError, match="a dynamic one cannot be given"):
        W8A8Linear(q, ACTIVATIONS["int8-token"], torch.ones(1))
