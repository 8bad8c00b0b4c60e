"""Float32 products by another library: still float32, and only within."""

from __future__ import annotations

import pytest
import torch

from fewbits.engine import fast_float32, float32


@pytest.mark.parametrize("shape", float32.SHAPES)
def test_bf16_products_are_found_out(shape: tuple[int, int, int]) -> None:
    assert float32.exact(torch.mm, *shape)
    assert not float32.exact(lambda x, w: (x.bfloat16() @ w.bfloat16()).float(), *shape)


@pytest.mark.parametrize("shape", [(3, 700, 5), (64, 64, 64), (128, 4096, 96)])
def test_products_within_are_float32_sums(shape: tuple[int, int, int]) -> None:
    rows, columns, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, columns, generator=generator), torch.randn(outputs, columns, generator=generator)
    with fast_float32("cpu"):
        found = x @ w.T
    bound = columns * float32.UNIT * (x.double().abs() @ w.double().abs().T)
    assert ((found.double() - x.double() @ w.double().T).abs() <= bound).all()


def test_the_setting_is_restored() -> None:
    with pytest.raises(RuntimeError, match="stop"), fast_float32("cpu"):
        raise RuntimeError("stop")
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_somebody_else_decided_stands() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with fast_float32("cpu"):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    with fast_float32("meta"):
        assert torch.get_float32_matmul_precision() == "highest"
