"""Products of codes: integers exactly as int64 has them, FP8 up to float32's sums."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import FormatError
from fewbits.formats import ACTIVATIONS
from fewbits.kernels import fp8_linear, int8_linear
from fewbits.kernels.fp8_linear import _scaled_mm
from fewbits.kernels.int8_linear import _exact_on, _int_mm, _summed_in_float, int_matmul

SHAPES = [(m, k, n) for m in (1, 2, 16, 17, 33) for k in (1, 7, 8, 172, 1025) for n in (1, 3, 8, 65)]
PRODUCTS = [int_matmul, _int_mm, _summed_in_float]


def codes(*shape, seed=0):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def floats(*shape, seed=0):
    """E4M3 codes of numbers over their whole range."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 40
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("product", PRODUCTS)
def test_integer_products_are_exact_at_every_shape(product):
    for m, k, n in SHAPES:
        x, w = codes(m, k), codes(n, k, seed=1)
        found = product(x, w)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), x.long() @ w.long().T), (m, k, n)


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_largest_codes_do_not_saturate(product):
    x, w = torch.full((3, 65536), -128, dtype=torch.int8), torch.full((2, 65536), -128, dtype=torch.int8)
    w[1] = 127
    assert product(x, w).tolist() == [[2**30, -128 * 127 * 65536]] * 3


def test_a_device_without_an_exact_product_gets_float_sums(monkeypatch):
    def saturating(x, w):
        return (x.long() @ w.long().T).clamp(-(1 << 15), (1 << 15) - 1).int()

    monkeypatch.setattr("torch._int_mm", lambda x, w: saturating(x, w.t()))
    assert not _exact_on.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr("torch._int_mm", lambda x, w: (_ for _ in ()).throw(NotImplementedError))
    assert not _exact_on.__wrapped__(torch.device("cpu"))


def test_products_that_int32_may_not_hold_are_refused():
    wide = torch.zeros(1, 65537, dtype=torch.int8)
    with pytest.raises(FormatError, match="65537 columns may exceed int32"):
        int_matmul(wide, wide)


def test_operands_need_not_be_contiguous():
    x, w = codes(64, 9).T[::2], codes(64, 24, seed=1).T[1::3]
    assert torch.equal(int_matmul(x, w).long(), x.long() @ w.long().T)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("with_zero", [True, False])
def test_scales_zero_points_and_bias(per_token, per_row, with_zero):
    x, w = codes(2, 5, 40), codes(7, 40, seed=1)
    x_scale = torch.rand(2, 5, 1) if per_token else torch.rand(1)
    w_scale = torch.rand(7) if per_row else torch.rand(1)
    w_zero = torch.randint(-128, 128, (7,) if per_row else (1,)).float() if with_zero else None
    bias = torch.randn(7)
    found = int8_linear(x, x_scale, w, w_scale, w_zero, bias)
    centred = w.double() - (w_zero.double()[:, None] if w_zero is not None else 0)
    expected = (x.double() @ centred.T) * x_scale.double() * w_scale.double() + bias.double()
    assert found.shape == (2, 5, 7)
    assert found.dtype == torch.float32
    # int32 to float32, two factors and a sum round four times, each by at most 2^-24 of what stands there
    assert ((found - expected).abs() <= 4 * 2.0**-24 * ((expected - bias).abs() + bias.abs())).all()


@pytest.mark.parametrize("product", [lambda x, w: fp8_linear(x, torch.ones(1), w, torch.ones(1)), _scaled_mm])
def test_fp8_products_are_float32_sums(product):
    for m, k, n in SHAPES:
        x, w = floats(m, k), floats(n, k, seed=1)
        exact = x.double() @ w.double().T
        bound = k * 2.0**-24 * (x.double().abs() @ w.double().abs().T)
        found = product(x, w)
        assert found.shape == (m, n)
        assert ((found - exact).abs() <= bound).all(), (m, k, n)


def test_fp8_scales_and_bias():
    format = ACTIVATIONS["fp8-token"]
    x = torch.randn(2, 5, 40)
    x_q, x_scale = format.quantize(x)
    w_q, w_scale, bias = floats(7, 40, seed=1), torch.rand(7), torch.randn(7)
    found = fp8_linear(x_q, x_scale, w_q, w_scale, bias)
    numbers, w = format.dequantize(x_q, x_scale), w_q.float() * w_scale[:, None]
    bound = 44 * 2.0**-23 * (numbers.abs() @ w.abs().T + bias.abs())
    assert ((found - (numbers @ w.T + bias)).abs() <= bound).all()
