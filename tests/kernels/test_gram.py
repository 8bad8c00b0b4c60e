"""xᵀ·x against float64, compiled and not."""

from __future__ import annotations

import pytest
import torch

from fewbits.kernels import _compiled
from fewbits.kernels.gram import add_gram, mirror, reference

SHAPES = [(1, 1), (2, 3), (3, 48), (7, 49), (255, 95), (256, 97), (257, 8), (600, 200), (1000, 530)]


def numbers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Of very different sizes, as hidden states are."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    return x.to(dtype)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [add_gram, reference])
def test_it_is_added_above_the_diagonal(add, rows, columns, dtype):
    x = numbers(rows, columns, dtype)
    before = torch.randn(columns, columns)
    total = before.clone()
    add(total, x)
    exact, sizes = (a.double().T @ a.double() for a in (x, x.abs()))
    found = (total.double() - before.double()).triu()
    bound = (rows + 2) * 2.0**-24 * (sizes + before.abs())  # n products and what was there, summed in any order
    assert ((found - exact.triu()).abs() <= bound.triu()).all()
    mirror(total)
    assert torch.equal(total, total.T)


def test_threads_do_not_change_a_bit():
    core = _compiled.compiled()
    if core is None or not core.multiplies_bf16():
        pytest.skip("no BF16 products compiled for this processor")
    x = numbers(600, 200, torch.bfloat16)
    found = []
    for threads in (1, 5):
        found.append(torch.zeros(200, 200))
        core.add_gram(x.view(torch.uint16), found[-1], threads)
    assert torch.equal(found[0].triu(), found[1].triu())


def test_shapes_that_do_not_fit_are_refused():
    core = _compiled.compiled()
    if core is None:
        pytest.skip("fewbits was built without a compiler")
    with pytest.raises(ValueError, match="total"):
        core.add_gram(torch.zeros(3, 4, dtype=torch.uint16), torch.zeros(3, 3), 1)
