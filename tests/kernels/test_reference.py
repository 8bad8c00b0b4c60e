"""The reference kernels against torch on the decoded weight."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional

from fewbits.formats import FORMATS, QTensor
from fewbits.kernels import Packed, embedding, linear
from fewbits.kernels.decode import reference

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
    for module in ("decode", "linear"):
        monkeypatch.setattr(sys.modules[f"fewbits.kernels.{module}"], "BLOCK", 7 * 64)


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


def test_blocks_cover_every_row_once(weight):
    blocks = list(Packed.of(weight).blocks(torch.float32, 7 * 64))
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 7), (7, 14), (14, 21), (21, 24)]
    assert torch.equal(torch.cat([block for _, block in blocks]), weight.dequantize())


def test_embedding_is_indexing(weight):
    ids = torch.tensor([[3, 0, 3], [23, 7, 1]])
    found = embedding(ids, Packed.of(weight), torch.float32)
    assert torch.equal(found, weight.dequantize()[ids])
    assert embedding(ids, Packed.of(weight), torch.float16).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_float_weight_never_exists_whole(monkeypatch, dtype):
    """The largest float tensor that multiplying makes is one block, compiled or not."""
    weight, sizes = quantized("int4-g32", 64, 64), []
    for module in ("decode", "linear"):
        monkeypatch.setattr(sys.modules[f"fewbits.kernels.{module}"], "BLOCK", 8 * 64)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **more: sizes.append(empty(*args, **more).numel()) or empty(*args, **more)
    )
    linear(torch.randn(1, 64).to(dtype), Packed.of(weight))
    assert max(sizes) == 512


def test_the_reference_decodes_a_block_at_a_time(monkeypatch):
    weight = quantized("int4-g32", 64, 64)
    monkeypatch.setattr(sys.modules["fewbits.kernels.decode"], "BLOCK", 8 * 64)
    seen = []
    decode = type(weight.format).decode

    def spy(self, codes, params):
        seen.append(codes.numel())
        return decode(self, codes, params)

    monkeypatch.setattr(type(weight.format), "decode", spy)
    reference(Packed.of(weight))(slice(0, 64), torch.empty(64, 64))
    assert seen == [512] * 8
