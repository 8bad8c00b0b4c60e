"""Products of every format on every target, against float64 sums of the same rounded inputs and decoded weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fewbits.engine.tiling import tiled
from fewbits.formats import FORMATS, QTensor
from fewbits.runtime.compiled import compiled, kernel_weight, targets
from fewbits.runtime.reference import rounded
from fewbits.runtime.tiles import Tiles, Weight, decode

core = compiled()
pytestmark = pytest.mark.skipif(core is None, reason="the kernels were not compiled")

FLOAT_UNIT = 2.0**-24
SHAPES = ((16, 32), (33, 256), (40, 520))  # whole tiles; a panel's tail; a block's and a group's tail
ROWS = (1, 2, 3, 8, 13, 17, 23)  # streamed, in one pass and in two; tiles of each target, and their tails
SOME = (
    "int2-g16",
    "int3-g128",
    "int4-g32",
    "int5-asym-g32",
    "int6",
    "int8-asym-g64",
    "nf4",
    "fp8-e4m3",
    "q4_k",
    "q6_k",
)


def weight_in(name: str, rows: int, columns: int) -> Weight | None:
    """A random matrix; None where the format does not hold that shape."""
    format = FORMATS[name]
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * 0.02
    try:
        format.check((rows, columns))
    except Exception:
        return None
    codes, params = format.plain(w)
    return tiled(QTensor(format, codes, params))


def inputs(rows: int, columns: int) -> NDArray[np.float32]:
    return np.random.default_rng(rows).standard_normal((rows, columns), np.float32)


def multiplied(weight: Weight, x: NDArray[np.float32], target: str, threads: int = 1) -> NDArray[np.float32]:
    out = np.full((len(x), weight.rows), np.nan, np.float32)
    core.multiply(target, threads, kernel_weight(weight), x, out, None, False)
    return out


def without_offset(weight: Weight) -> Weight:
    return weight if not isinstance(weight, Tiles) else dataclasses.replace(weight, offset=None)


def expected(weight: Weight, x: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The product, and how far float32 may be off.

    Products of codes are exact. A segment's are scaled and added, its offset likewise (params are decoded with two
    roundings), and every 128 columns the sum is scaled and added to the whole. So each number is rounded once for each
    segment that it goes through, and a few times before and after: at most (segments · 3 + 4) · 2⁻²⁴ of the sum of
    magnitudes. Those are of what is added, before an offset and
    the rest cancel out. Floating-point weights are added one by one.
    """
    held = rounded(x) if isinstance(weight, Tiles) else x
    w = decode(weight)
    parts = abs(decode(without_offset(weight))) + abs(w - decode(without_offset(weight)))
    added = 3 * -(-weight.columns // min(weight.group, 128)) if isinstance(weight, Tiles) else weight.columns
    bound = (added + 4) * FLOAT_UNIT * (abs(held).astype(np.float64) @ parts.T.astype(np.float64))
    return held.astype(np.float64) @ w.T.astype(np.float64), bound


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_multiplies(name: str) -> None:
    for rows, columns in SHAPES:
        weight = weight_in(name, rows, columns)
        if weight is None:
            continue
        for count in (1, 7):
            x = inputs(count, columns)
            y, bound = expected(weight, x)
            assert (abs(multiplied(weight, x, targets()[0]) - y) <= bound).all(), (rows, columns, count)


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("name", SOME)
def test_every_target_multiplies_any_number_of_rows(name: str, target: str) -> None:
    for rows, columns in ((33, 256), (100, 768)):
        weight = weight_in(name, rows, columns)
        assert weight is not None
        for count in ROWS:
            x = inputs(count, columns)
            y, bound = expected(weight, x)
            assert (abs(multiplied(weight, x, target) - y) <= bound).all(), (rows, columns, count)


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("name", SOME)
def test_rows_and_threads_change_no_bit(name: str, target: str) -> None:
    weight = weight_in(name, 200, 1280)
    assert weight is not None
    x = inputs(13, 1280)
    together = multiplied(weight, x, target)
    assert np.array_equal(multiplied(weight, x, target, threads=3), together)
    for r in (0, 5, 12):
        assert np.array_equal(multiplied(weight, x[r : r + 1], target)[0], together[r])
    assert np.array_equal(multiplied(weight, x[4:6], target), together[4:6])


@pytest.mark.parametrize("name", SOME)
def test_it_adds_to_a_bias_and_to_what_is_there(name: str) -> None:
    weight = weight_in(name, 33, 256)
    assert weight is not None
    bias = np.random.default_rng(1).standard_normal(33, np.float32)
    for count in (1, 7):
        x = inputs(count, 256)
        y, bound = expected(weight, x)
        before = np.random.default_rng(2).standard_normal((count, 33), np.float32)
        out = before.copy()
        core.multiply(targets()[0], 2, kernel_weight(weight), x, out, bias, True)
        more = 40 * FLOAT_UNIT * (abs(before) + abs(bias))  # they go through the roundings of 16 segments too
        assert (abs(out - (y + before + bias)) <= bound + more).all()


def test_extreme_codes_do_not_saturate() -> None:
    """All codes and inputs as large as they get: sums of pairs in 16 bits would overflow at 8 bits."""
    columns = 256
    for name in ("int8-asym", "int8", "int6-asym"):
        format = FORMATS[name]
        w = torch.full((16, columns), 1.0)
        w[:, ::2] = -1.0 if "asym" not in name else 0.0
        codes, params = format.plain(w)
        weight = tiled(QTensor(format, codes, params))
        for sign in (-1.0, 1.0):
            x = np.full((7, columns), sign, np.float32)
            y, bound = expected(weight, x)
            for target in targets():
                assert (abs(multiplied(weight, x, target) - y) <= bound).all(), (name, sign, target)


def test_a_nan_is_not_lost() -> None:
    weight = weight_in("int4-g32", 33, 256)
    assert weight is not None
    for count in (1, 7):
        x = inputs(count, 256)
        x[0, 100] = np.nan
        out = multiplied(weight, x, targets()[0])
        assert np.isnan(out[0]).all()
        assert np.isfinite(out[1:]).all()


def test_inputs_of_zero_give_zero() -> None:
    weight = weight_in("int4-asym-g32", 33, 256)
    assert weight is not None
    assert (multiplied(weight, np.zeros((7, 256), np.float32), targets()[0]) == 0).all()


def test_arrays_that_do_not_fit_are_refused() -> None:
    weight = weight_in("int4-g32", 33, 256)
    assert isinstance(weight, Tiles)
    with pytest.raises(ValueError, match=r"codes must be \[panels, blocks, 64 · bits\]"):
        kernel_weight(dataclasses.replace(weight, rows=49))
    with pytest.raises(ValueError, match="do not fit one another"):
        multiplied(weight, inputs(1, 255), targets()[0])
    with pytest.raises(ValueError, match="not compiled in"):
        multiplied(weight, inputs(1, 256), "abacus")
