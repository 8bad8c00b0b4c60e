"""HQQ against its own objective: below least squares in every group, and towards the best of an exhaustive search."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import FORMATS, Affine, Grouped, QTensor, format_named
from fewbits.formats.explain import family
from fewbits.formats.minifloat import Fp8
from fewbits.methods import METHODS, TensorMethod, quantize_tensor
from fewbits.methods.hqq import HQQ

ONE_OF_EACH = {family(format): name for name, format in FORMATS.items() if isinstance(format, Grouped)}


def heavy_tailed(*shape: int) -> Tensor:
    """Student's t with three degrees of freedom: variance, but no kurtosis."""
    g = torch.Generator().manual_seed(0)
    chi = torch.randn(*shape, 3, generator=g).square().mean(-1)
    return 0.02 * torch.randn(*shape, generator=g) / chi.sqrt()


def powers(q: QTensor, w: Tensor, p: float = 0.7) -> Tensor:
    """Σ|e|^p of each group."""
    assert isinstance(q.format, Grouped)
    return q.format.grouped((q.dequantize() - w).abs().pow(p)).sum(-1)


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_no_group_is_worse_than_by_least_squares(name: str) -> None:
    w = heavy_tailed(16, 256)
    found, squares = powers(quantize_tensor(w, name, method="hqq"), w), powers(quantize_tensor(w, name), w)
    if FORMATS[name].name in ("nvfp4", "nf4-dq", "fp8-e4m3-b128"):  # whose params hang together
        found, squares = found.sum(), squares.sum()
    elif FORMATS[name].span == 256:  # columns whose params hang together, all of them here
        found, squares = found.sum(-1), squares.sum(-1)
    assert (found <= squares * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["int2-g64", "int3-asym-g64", "int4-g128", "nf4", "ternary-g64"])
def test_long_tails_are_where_it_pays(name: str) -> None:
    w = heavy_tailed(64, 256)
    assert powers(quantize_tensor(w, name, method="hqq"), w).sum() < 0.985 * powers(quantize_tensor(w, name), w).sum()


def exhaustive(w: Tensor, format: Affine) -> Tensor:
    """The least Σ|e|^p of each row over 400 scales and all zero-points, [N]."""
    reach = (w.amax(-1, keepdim=True) - w.amin(-1, keepdim=True)) / format.highest
    least = torch.full((len(w),), torch.inf)
    for factor in torch.linspace(0.05, 1.1, 400):
        for zero in range(format.highest + 1):
            params = {"scale": format.stored(reach * factor), "zero": torch.full_like(reach, zero)}
            error = format.decode(format.round(w, params), params) - w
            least = torch.minimum(least, error.abs().pow(0.7).sum(-1))
    return least


def test_between_least_squares_and_the_best_that_any_params_reach() -> None:
    """The problem is not convex, so a descent from least squares goes a part of the way only: an eighth of it here."""
    w, format = heavy_tailed(24, 64), Affine(bits=3, symmetric=False, group=64)
    best, squares = exhaustive(w, format).sum(), powers(quantize_tensor(w, format), w).sum()
    found = powers(quantize_tensor(w, format, method="hqq"), w).sum()
    assert best <= found < squares - 0.1 * (squares - best)


def test_experts_keep_to_themselves() -> None:
    w = torch.stack([heavy_tailed(8, 128), heavy_tailed(8, 128).flip(0) * 3])
    for name in ("int4-g32", "int3-tensor", "nvfp4", "nf4-dq"):
        both = quantize_tensor(w, name, method="hqq").dequantize()
        alone = [quantize_tensor(x, name, method="hqq").dequantize() for x in w]
        assert torch.equal(both, torch.stack(alone))


def test_scales_of_blocks_of_rows_stay_those_of_the_block() -> None:
    """The rows of a block accept new params together, by the sum over all of them; so does each super-block."""
    w, format = heavy_tailed(200, 256), format_named("fp8-e4m3-b128")
    found, plain = quantize_tensor(w, format, method="hqq"), format.fit(w, search=True)
    scale, moved = found.params["scale"], found.params["scale"] != plain["scale"]
    assert moved.any()
    for block in (scale[:128], scale[128:]):
        assert torch.equal(block, block[:1].expand_as(block))
    change = torch.arange(12.0).reshape(3, 4)
    assert isinstance(format, Fp8)
    assert replace(format, rows=2).fitted_together(change)[:, 0].tolist() == [0 + 4, 0 + 4, 8]


def test_more_iterations_never_hurt() -> None:
    w, format = heavy_tailed(16, 256), format_named("int3-asym-g64")
    sums = [powers(HQQ(iterations=i).quantize(w, format, {}), w) for i in range(5)]
    for before, after in pairwise(sums):
        assert (after <= before).all()


def test_an_importance_is_refused() -> None:
    method = METHODS["hqq"]
    assert isinstance(method, TensorMethod)
    with pytest.raises(UnsupportedError, match="cannot use an importance; use rtn"):
        quantize_tensor(heavy_tailed(4, 64), "int4-g32", method="hqq", importance=torch.ones(64))
