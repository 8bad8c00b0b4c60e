"""The reference kernels against torch on the decoded weight."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fewbits.formats import FORMATS, QTensor
from fewbits.kernels import Packed, embedding, linear
from fewbits.kernels import packed as packed_module

NAMES = ["int4-g32", "int3-g32", "int8", "int8-tensor", "int4-asym-g32", "nf4", "nf4-dq", "nvfp4", "q4_0", "fp8-e4m3"]


def quantized(name: str, n: int = 24, k: int = 64) -> QTensor:
    format = FORMATS[name]
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    params = format.fit(w)
    return QTensor(format, format.round(w, params), params)


@pytest.fixture(params=NAMES)
def weight(request) -> QTensor:
    return quantized(request.param)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 rows of 64, so that 24 rows make three whole ones and a rest."""
    monkeypatch.setattr(packed_module, "BLOCK", 7 * 64)


def sum_error(x, w, bias=0.0):
    """Bound on the difference of two float32 sums of the same K products: K · 2⁻²³ · Σ|xᵢwᵢ|, for either order."""
    return x.shape[-1] * 2.0**-23 * (x.abs() @ w.abs().T + abs(bias))


@pytest.mark.usefixtures("small_blocks")
def test_linear_is_torchs_on_the_decoded_weight(weight):
    x, bias = torch.randn(2, 5, 64), torch.randn(24)
    w = weight.dequantize()
    found = linear(x, Packed.of(weight), bias)
    assert found.shape == (2, 5, 24)
    assert ((found - functional.linear(x, w, bias)).abs() <= sum_error(x, w, bias.abs().max())).all()


def test_linear_keeps_the_dtype_of_x(weight):
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    found = linear(x, Packed.of(weight))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, functional.linear(x, weight.dequantize().bfloat16()))


@pytest.mark.usefixtures("small_blocks")
def test_blocks_cover_every_row_once(weight):
    blocks = list(Packed.of(weight).blocks())
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 7), (7, 14), (14, 21), (21, 24)]
    assert torch.equal(torch.cat([block for _, block in blocks]), weight.dequantize())


def test_embedding_is_indexing(weight):
    ids = torch.tensor([[3, 0, 3], [23, 7, 1]])
    found = embedding(ids, Packed.of(weight), torch.float32)
    assert torch.equal(found, weight.dequantize()[ids])
    assert embedding(ids, Packed.of(weight), torch.float16).dtype == torch.float16


def test_the_float_weight_never_exists_whole(monkeypatch):
    """The largest float tensor that decoding makes is one block."""
    weight = quantized("int4-g32", 64, 64)
    monkeypatch.setattr(packed_module, "BLOCK", 8 * 64)
    seen = []
    decode = type(weight.format).decode

    def spy(self, codes, params):
        seen.append(codes.numel())
        return decode(self, codes, params)

    monkeypatch.setattr(type(weight.format), "decode", spy)
    linear(torch.randn(1, 64), Packed.of(weight))
    assert seen == [512] * 8
