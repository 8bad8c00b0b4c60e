"""Layers in tiles: their arithmetic, against torch on the decoded weight, within what rounding of inputs can do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime_CAPI  # a capsule of somebody else's

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.engine.tiling import tiled
from fewbits.errors import UnsupportedError
from fewbits.formats import FORMATS, QTensor
from fewbits.kernels.threads import team
from fewbits.nn import PackedWeight, QuantizedEmbedding, QuantizedLinear, TiledEmbedding, TiledLinear, replace_tiled
from fewbits.runtime.compiled import compiled, targets
from fewbits.runtime.products import Matrix, Products

pytestmark = pytest.mark.skipif(compiled() is None, reason="the kernels were not compiled")

FLOAT_UNIT = 2.0**-24
SHAPES = ((16, 32), (33, 256), (100, 520))  # whole tiles; a panel's tail; a block's and a group's tail
FORMATS_TRIED = ("int2-g16", "int4-g32", "int4-asym-g128", "int8", "q4_k", "fp8-e4m3")


def weight_in(name: str, rows: int, columns: int) -> QTensor | None:
    format = FORMATS[name]
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    if columns % 256 and name == "q4_k":
        return None
    return QTensor(format, *format.plain(w))


def matrix_of(weight: QTensor, threads: int = 2) -> Matrix:
    return Products(threads).matrix(tiled(weight))


def bound(x: Tensor, w: Tensor) -> Tensor:
    """How far a product may be from that of x as it is.

    A number of x is a code times a 127th of the largest magnitude p among its 128 columns, so it is off by p / 254 at
    most (the factors' own rounding adds 3 · 2⁻²⁴ of p), the product by the sum of that times |w|. Sums in float32 on
    both sides are off by no more than 2⁻²⁴ for each column, of the sum of magnitudes.
    """
    padded = functional.pad(x.abs(), (0, -x.shape[-1] % 128))
    peaks = padded.view(*x.shape[:-1], -1, 128).amax(-1).repeat_interleave(128, -1)[..., : x.shape[-1]]
    magnitudes = (x.abs() + peaks / 254) @ w.abs().T
    return peaks * (1 / 254 + 3 * FLOAT_UNIT) @ w.abs().T + 2 * x.shape[-1] * FLOAT_UNIT * magnitudes


@pytest.mark.parametrize("name", FORMATS_TRIED)
@pytest.mark.parametrize("leading", [(1,), (2, 3), (13,)], ids=str)
def test_linear_is_torchs_within_the_rounding_of_inputs(name, leading):
    for rows, columns in SHAPES:
        weight = weight_in(name, rows, columns)
        if weight is None:
            continue
        x, bias = torch.randn(*leading, columns), nn.Parameter(torch.randn(rows))
        y = TiledLinear(matrix_of(weight), bias)(x)
        expected = functional.linear(x, weight.dequantize(), bias.detach())
        assert y.shape == expected.shape
        allowed = bound(x, weight.dequantize()) + FLOAT_UNIT * bias.detach().abs()
        assert ((y - expected).abs() <= allowed).all(), (rows, columns)


def test_inputs_that_are_codes_lose_nothing():
    """Whole numbers up to 127, one of each 128 at that, are their own codes: only sums in float32 are left."""
    weight = weight_in("int4-g32", 48, 256)
    assert weight is not None
    x = torch.randint(-126, 127, (5, 256), generator=torch.Generator().manual_seed(2)).float()
    x[:, ::128] = 127
    y, w = TiledLinear(matrix_of(weight))(x).double(), weight.dequantize()
    assert ((y - x.double() @ w.double().T).abs() <= 256 * FLOAT_UNIT * x.abs() @ w.abs().T).all()


def test_zeros_in_are_the_bias_out():
    weight, bias = weight_in("int4-asym-g128", 33, 256), nn.Parameter(torch.randn(33))
    assert weight is not None
    assert torch.equal(TiledLinear(matrix_of(weight), bias)(torch.zeros(3, 256)), bias.detach().expand(3, 33))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_inputs_dtype(dtype):
    weight = weight_in("int4-g32", 33, 256)
    assert weight is not None
    layer = TiledLinear(matrix_of(weight), nn.Parameter(torch.randn(33))).to(dtype)
    x = torch.randn(2, 256).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.float()).to(dtype))


def test_no_rows_and_parts_of_larger_tensors():
    weight = weight_in("int4-g32", 33, 256)
    assert weight is not None
    layer, x = TiledLinear(matrix_of(weight)), torch.randn(4, 512)
    assert layer(x[:0, :256]).shape == (0, 33)
    assert torch.equal(layer(x[:, 256:]), layer(x[:, 256:].clone()))
    assert torch.equal(layer(x.view(8, 256).T.contiguous().T), layer(x.view(8, 256)))


def test_threads_targets_and_rows_change_nothing():
    """One row, many rows, and rows after a larger run, whose buffers are there still."""
    weight = weight_in("int4-g32", 100, 520)
    assert weight is not None
    x = torch.randn(40, 520).numpy()
    one = matrix_of(weight, threads=1)
    whole = one.multiply(x)
    assert (matrix_of(weight, threads=3).multiply(x) == whole).all()
    assert all((one.multiply(x[i : i + 1])[0] == whole[i]).all() for i in (0, 7, 39))
    for target in targets():
        found = Products(2, target).matrix(tiled(weight)).multiply(x)
        assert (torch.from_numpy(found - whole).abs() <= 520 * FLOAT_UNIT * bound_of_sums(x, weight)).all(), target


@pytest.mark.skipif(team() is None, reason="built without OpenMP")
def test_torchs_threads_change_nothing():
    """Of one row, which one thread multiplies, and of so many that the team is called; whoever asks."""
    weight = weight_in("int4-g32", 100, 520)
    assert weight is not None
    x = torch.randn(400, 520).numpy()
    whole, shared = matrix_of(weight, threads=1).multiply(x), Products(3, team=team()).matrix(tiled(weight))
    assert (shared.multiply(x) == whole).all()
    assert (shared.multiply(x[:1])[0] == whole[0]).all()
    with ThreadPoolExecutor(2) as pool:
        assert all((found == whole).all() for found in pool.map(shared.multiply, [x] * 8))
    assert (shared.look_up(torch.tensor([99, 0]).numpy()) == weight.dequantize()[[99, 0]].numpy()).all()


def bound_of_sums(x, weight: QTensor) -> Tensor:
    """Sums of magnitudes, which another order of additions may move by a unit for each."""
    return 2 * torch.from_numpy(x).abs() @ weight.dequantize().abs().T


@pytest.mark.parametrize("name", ["int4-g32", "int4-asym-g128", "int8", "fp8-e4m3"])
def test_embedding_is_rows_of_the_weight(name):
    """A level times a scale is one rounding; with a zero-point it is a product, and a sum, of such."""
    weight = weight_in(name, 100, 520)
    assert weight is not None
    layer, ids = TiledEmbedding(matrix_of(weight), 1, torch.float32), torch.tensor([[0, 99, 16], [15, 99, 0]])
    expected = weight.dequantize()[ids]
    allowed = 3 * FLOAT_UNIT * weight.dequantize().abs().max() * (4 if "asym" in name else 1)
    assert layer(ids).shape == (2, 3, 520)
    assert ((layer(ids) - expected).abs() <= allowed).all()
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="row 100 is not one of 0 … 99"):
        layer(torch.tensor([100]))


def test_replace_keeps_bias_dtype_and_mode():
    weight = weight_in("int4-g32", 33, 256)
    assert weight is not None
    store, bias = PackedWeight.of(weight, torch.bfloat16), torch.randn(33)
    model = nn.ModuleDict({"out": QuantizedLinear(store, bias), "table": QuantizedEmbedding(store, 2)}).eval()
    matrix = matrix_of(weight)
    for name in ("out", "table"):
        replace_tiled(model, name, matrix)
    assert isinstance(model["out"], TiledLinear)
    assert isinstance(model["table"], TiledEmbedding)
    assert model["out"].matrix is model["table"].matrix
    assert model["out"].bias is not None
    assert torch.equal(model["out"].bias, bias)
    assert model["table"].padding_idx == 2
    assert torch.equal(model["out"].weight, weight.dequantize().bfloat16())
    assert not model["out"].training
    assert "in_features=256, out_features=33, bias=True" in repr(model)
    with pytest.raises(UnsupportedError, match="0 is a Linear"):
        replace_tiled(nn.Sequential(nn.Linear(256, 33)), "0", matrix)


def test_another_device_and_another_target_are_refused():
    weight = weight_in("int4-g32", 33, 256)
    assert weight is not None
    with pytest.raises(UnsupportedError, match=r"'meta'.*CPU alone"):
        TiledLinear(matrix_of(weight))(torch.zeros(1, 256, device="meta"))
    with pytest.raises(UnsupportedError, match="'riscv' is not among"):
        Products(1, "riscv")
    with pytest.raises(ValueError, match="a team comes in a capsule"):
        Products(1, team=datetime_CAPI)
    with pytest.raises(ValueError, match="do not fit"):
        matrix_of(weight).multiply(torch.zeros(1, 255).numpy())
