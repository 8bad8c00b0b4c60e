"""What every format promises, as plain functions that take a format: `test_formats.py` runs them over the registry.

A check raises AssertionError. Tolerances follow from how a code is chosen: round works in float32 on w · (1/scale), so
it can mistake the nearer of two levels only where w is within a few units in the last place of their middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from fewbits import formats
from fewbits.errors import FormatError
from fewbits.formats import Float, Format, Grouped, Params, QTensor

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny


def weights(*shape: int, seed: int = 0, spread: float = 0.02) -> Tensor:
    """Normal numbers of the size that trained weights have."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def quantized(format: Format, w: Tensor, importance: Tensor | None = None, *, search: bool = False) -> QTensor:
    params = format.fit(w, importance, search=search)
    return QTensor(format, format.round(w, params), params)


def allows(format: Format, shape: tuple[int, ...]) -> bool:
    try:
        format.check(shape)
    except FormatError:
        return False
    return True


def width(format: Format, columns: int) -> int:
    """So many columns, or as few more as the format's blocks need."""
    span = format.span if isinstance(format, Grouped) and isinstance(format.span, int) else 1
    return columns if allows(format, (1, columns)) else -(-columns // span) * span


def bits_of(x: Tensor) -> Tensor:
    """The tensor's bytes, so that −0 differs from 0."""
    return x.contiguous().view(torch.uint8)


def same(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def part(params: Params, index: int | slice) -> Params:
    return {key: p[index] for key, p in params.items()}


def all_codes(format: Format, dtype: torch.dtype) -> Tensor:
    """Every code of a format, from its cells and the dtype of its codes."""
    if set(format.cells) == {"T"}:
        return torch.tensor([-1, 0, 1], dtype=dtype)
    count = 1 << len(format.cells)
    first = -count // 2 if dtype.is_signed else 0
    return torch.arange(first, first + count).to(dtype)


def grids(q: QTensor) -> Tensor:
    """For each number of q all the numbers it could have been, ascending: [..., N, K, codes]. NaN and Inf are at 0."""
    codes = all_codes(q.format, q.codes.dtype).reshape(-1, *[1] * q.codes.dim())
    grid = q.format.decode(codes.expand(-1, *q.shape).contiguous(), q.params).movedim(0, -1).contiguous()
    return torch.where(grid.isfinite(), grid, grid.nan_to_num(0, 0, 0)).sort(-1).values


def squared_error(q: QTensor, w: Tensor, importance: Tensor | float = 1.0) -> float:
    return float((importance * (q.dequantize().double() - w.double()).square()).sum())


def assert_nearest(q: QTensor, w: Tensor) -> None:
    """No other code would have been nearer: so inside the range the error is at most half the gap of its neighbours."""
    found = q.dequantize()
    assert found.isfinite().all()
    if isinstance(q.format, Float):
        digits = torch.finfo(q.format.dtype)
        assert ((found - w).abs() <= w.abs() * (digits.eps / 2) + digits.smallest_normal * digits.eps / 2).all()
        return
    grid = grids(q)
    w = w.float()
    # Two roundings (1/scale, the product), each off by half a unit of the position on the grid, and a subnormal scale
    # that counts as zero.
    slack = 4 * EPS * grid.abs().amax(-1) + 4 * EPS * w.abs() + len(grid[0, 0].unique()) * TINY
    best = (grid - w.unsqueeze(-1)).abs().amin(-1)
    assert ((found - w).abs() <= best + slack).all()
    inside = (w >= grid[..., 0]) & (w <= grid[..., -1])
    above = torch.searchsorted(grid, w.unsqueeze(-1).contiguous()).clamp(1, grid.shape[-1] - 1)
    gap = (grid.gather(-1, above) - grid.gather(-1, above - 1)).squeeze(-1)
    assert ((found - w).abs() <= gap / 2 + slack)[inside].all()


# Bytes


def check_bytes(format: Format) -> None:
    """`arrays` and `nbytes` say what `pack` makes; `unpack` gives back every code and every param."""
    for shape in ((3, 96), (2, 172), (1, 1), (5, 33), (2, 3, 64), (2, 512), (2, 3, 256)):
        if not allows(format, shape):
            continue
        for search in (False, True):
            q = quantized(format, weights(*shape), search=search)
            packed = q.pack()
            assert {key: (a.dtype, tuple(a.shape)) for key, a in packed.items()} == {
                key: (spec.dtype, spec.shape) for key, spec in format.arrays(shape).items()
            }
            assert list(packed) == list(format.arrays(shape))
            assert format.nbytes(shape) == sum(a.numel() * a.element_size() for a in packed.values()) == q.nbytes
            back = QTensor.from_arrays(format, packed, shape)
            assert torch.equal(bits_of(back.codes), bits_of(q.codes))
            assert back.codes.dtype == q.codes.dtype
            assert same(back.params, q.params)
            assert torch.equal(bits_of(back.dequantize()), bits_of(q.dequantize()))


def check_every_code_packs(format: Format) -> None:
    """All codes in every position of a byte survive packing."""
    w = weights(2, width(format, 320))
    q = quantized(format, w)
    if isinstance(format, Float):
        return
    codes = all_codes(format, q.codes.dtype)
    drawn = codes[torch.randint(len(codes), w.shape, generator=torch.Generator().manual_seed(1))]
    back, _ = format.unpack(format.pack(drawn, q.params), tuple(w.shape))
    assert torch.equal(back, drawn)


def check_damage_is_named(format: Format) -> None:
    """A missing array or one of another shape is refused by name."""
    q = quantized(format, weights(2, width(format, 64)))
    for name in q.pack():
        arrays = q.pack()
        arrays[name] = arrays[name][..., :-1]
        with pytest.raises(FormatError, match=f"array '{name}'"):
            QTensor.from_arrays(format, arrays, q.shape)
        del arrays[name]
        with pytest.raises(FormatError, match=f"array '{name}'.*found nothing"):
            QTensor.from_arrays(format, arrays, q.shape)


# Numbers


def check_nearest(format: Format) -> None:
    for search in (False, True):
        w = weights(3, width(format, 96))
        assert_nearest(quantized(format, w, search=search), w)


def check_round_is_idempotent(format: Format) -> None:
    """A number that the format holds stays what it is (its code may change where two codes mean one number)."""
    for search in (False, True):
        q = quantized(format, weights(3, width(format, 96)), search=search)
        again = format.round(q.dequantize(), q.params)
        assert torch.equal(format.decode(again, q.params), q.dequantize())


def check_search_never_hurts(format: Format) -> None:
    """The error that is minimised, weighted or not, is never above that of the params from the range alone.

    Both errors are compared in float32 inside fit, as sums of n squares: off by at most n·ε relative, of each.
    """
    columns = format.span if isinstance(format, Grouped) and isinstance(format.span, int) else 64
    w = weights(96, columns)
    w[::3] = w[::3].pow(3) * 1000  # long tails
    for h in (None, torch.rand(96, columns, generator=torch.Generator().manual_seed(1)) ** 4 * 100):
        weight = torch.ones(()) if h is None else h
        before, after = (
            (weight * (quantized(format, w, h, search=search).dequantize() - w).double().square()).sum(-1)
            for search in (False, True)
        )
        if not format.rowwise:
            before, after = before.sum(), after.sum()
        assert (after <= before * (1 + 2 * columns * EPS)).all()


def check_importance_matters_only_where_given(format: Format) -> None:
    """Equal importance is none; importance in one column never makes that column much worse; zero is survivable."""
    w = weights(4, width(format, 96))
    a, b = quantized(format, w, search=True), quantized(format, w, torch.ones(width(format, 96)), search=True)
    assert torch.equal(a.dequantize(), b.dequantize())
    assert quantized(format, w, torch.zeros(width(format, 96)), search=True).dequantize().isfinite().all()
    focus = torch.full((width(format, 96),), 1e-6)
    focus[40] = 1.0
    focused = quantized(format, w, focus, search=True)
    plain = quantized(format, w, focus)
    slack = 1 + 2 * w.numel() * EPS
    assert squared_error(focused, w, focus) <= squared_error(plain, w, focus) * slack


def check_zeros(format: Format) -> None:
    for search in (False, True):
        assert not quantized(format, torch.zeros(3, width(format, 64)), search=search).dequantize().any()
        w = weights(4, width(format, 96))
        w[:, ::3] = 0
        q = quantized(format, w, search=search)
        has_zero = format.levels is None or 0 in format.levels
        if has_zero and not {"offset", "minimum_steps"} & q.params.keys():
            assert not q.dequantize()[:, ::3].any()
        if format.rowwise:
            w[2] = 0
            assert not quantized(format, w, search=search).dequantize()[2].any()
        negative_zero = quantized(format, -torch.zeros(3, width(format, 64)), search=search).dequantize()
        assert not negative_zero.any()


def check_outlier(format: Format) -> None:
    w = weights(4, width(format, 96))
    w[1, 5] = 300.0
    for search in (False, True):
        assert_nearest(quantized(format, w, search=search), w)


def check_repeated_value(format: Format) -> None:
    for value in (0.37, -0.37, 1.0, -1.0):
        for search in (False, True):
            w = torch.full((2, width(format, 64)), value)
            assert_nearest(quantized(format, w, search=search), w)


def check_extremes(format: Format) -> None:
    """From subnormal to nearly infinite: either refused, or every number still becomes the nearest one held."""
    for size in (1e-45, 1e-40, 1e-37, 1e-30, 1e-10, 1e-7, 1e-5, 1e4, 1e6, 1e10, 1e30, 1e38):
        w = weights(3, width(format, 64), spread=1.0).clamp(-3, 3) * size
        w[:, 5] = 0
        for search in (False, True):
            try:
                q = quantized(format, w, search=search)
            except FormatError as refused:
                assert format.name in str(refused)  # noqa: PT017
                continue
            assert_nearest(q, w)


def check_not_finite_is_refused(format: Format) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        for search in (False, True):
            w = weights(4, width(format, 96))
            w[1, 7] = w[3, 95] = bad
            with pytest.raises(FormatError, match=f"2 of {w.numel()} weights are NaN or Inf"):
                quantized(format, w, search=search)
    w = weights(4, width(format, 96))
    w[0, 0], w[0, 1], w[2, 2] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(FormatError, match=f"3 of {w.numel()} weights are NaN or Inf"):
        quantized(format, w)


# Shapes


def check_shapes(format: Format) -> None:
    """Odd shapes are held or refused with a sentence; what is refused is never half done."""
    for shape in ((1, 1), (7, 1), (1, 33), (3, 172), (2, 31), (5, 64), (2, 3, 64), (2, 1, 2, 33)):
        w = weights(*shape)
        if not allows(format, shape):
            with pytest.raises(FormatError, match=f"{format.name}: .*{shape[-1]}"):
                format.fit(w)
            continue
        for search in (False, True):
            assert_nearest(quantized(format, w, search=search), w)
    if not isinstance(format, Float):
        for shape in ((5,), (0, 4), (4, 0), ()):
            with pytest.raises(FormatError, match="not a non-empty matrix"):
                format.fit(torch.zeros(shape))


def check_ragged_tail(format: Format) -> None:
    """The last, shorter group gets the params it would get as a tensor of its own."""
    group = format.group if isinstance(format, Grouped) else None
    if not (isinstance(group, int) and format.rowwise):
        return
    for in_features in (group + 1, 1, 2 * group + group // 2 + 1, 172):
        tail = in_features % group
        if not allows(format, (3, in_features)):
            with pytest.raises(FormatError, match=f"in_features {in_features} is not a multiple"):
                format.fit(weights(3, in_features))
        if tail == 0 or not allows(format, (3, in_features)):
            continue
        w, importance = weights(3, in_features), torch.rand(in_features) + 0.1
        for h in (None, importance):
            for search in (False, True):
                whole = quantized(format, w, h, search=search)
                alone = quantized(format, w[:, -tail:], None if h is None else h[-tail:], search=search)
                assert same({key: p[..., -1:] for key, p in whole.params.items()}, alone.params)
                assert torch.equal(whole.codes[:, -tail:], alone.codes)


def check_layout_of_input_does_not_matter(format: Format) -> None:
    for search in (False, True):
        columns = width(format, 96)
        for strided in (weights(8, 2 * columns)[::2, ::2], weights(columns, 4).T):
            plain = quantized(format, strided.contiguous(), search=search)
            other = quantized(format, strided, search=search)
            assert torch.equal(plain.codes, other.codes)
            assert same(plain.params, other.params)
        for dtype in (torch.float16, torch.bfloat16):
            narrow = weights(4, width(format, 96)).to(dtype)
            a, b = quantized(format, narrow, search=search), quantized(format, narrow.float(), search=search)
            assert torch.equal(a.codes, b.codes)
            assert same(a.params, b.params)


def check_input_is_not_changed(format: Format) -> None:
    w, importance = weights(4, width(format, 96)), torch.rand(width(format, 96))
    before, importance_before = w.clone(), importance.clone()
    q = quantized(format, w, importance, search=True)
    codes, params = q.codes.clone(), {key: p.clone() for key, p in q.params.items()}
    q.dequantize()
    q.pack()
    format.round(w, q.params)
    format.plain(w)
    assert torch.equal(w, before)
    assert torch.equal(importance, importance_before)
    assert torch.equal(q.codes, codes)
    assert same(q.params, params)


def check_experts(format: Format) -> None:
    """Fused experts [E, N, K] are E separate matrices."""
    w = torch.stack([weights(5, width(format, 64), seed=seed, spread=0.01 * (seed + 1)) for seed in range(3)])
    for search in (False, True):
        fused = quantized(format, w, search=search)
        for e in range(3):
            alone = quantized(format, w[e], search=search)
            assert torch.equal(fused.codes[e], alone.codes)
            assert same(part(fused.params, e), alone.params)


def check_rows(format: Format) -> None:
    """A rowwise format may be quantized a few rows at a time."""
    if not format.rowwise:
        return
    w = weights(7, width(format, 96))
    for search in (False, True):
        whole = quantized(format, w, search=search)
        slabs = [quantized(format, w[rows], search=search) for rows in (slice(0, 3), slice(3, 7))]
        assert torch.equal(whole.dequantize(), torch.cat([q.dequantize() for q in slabs]))
        for key, array in whole.pack().items():
            assert torch.equal(bits_of(array), torch.cat([bits_of(q.pack()[key]) for q in slabs]))


def check_columns(format: Format) -> None:
    """A columnwise format rounds one column at a time at fixed params, to the same codes."""
    shape = (4, 172 if allows(format, (4, 172)) else width(format, 160))
    w = weights(*shape)
    params = format.fit(w)
    if not format.columnwise:
        with pytest.raises(FormatError, match="one column at a time"):
            format.at_columns(params, torch.tensor([0]))
        return
    codes = format.round(w, params)
    for column in (0, 1, 31, 32, 100, shape[1] - 1):
        at = format.at_columns(params, torch.tensor([column]))
        assert torch.equal(format.round_at(w[:, column : column + 1], at), codes[:, column : column + 1])
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))
    assert torch.equal(format.round_at(w[:, order], format.at_columns(params, order)), codes[:, order])


def check_rescaling(format: Format) -> None:
    """Moved scales are the bytes' own, and the numbers move by the factor, or not at all, to a scale's precision."""
    if not isinstance(format, Grouped):
        return
    w = weights(4, 256)
    q = quantized(format, w)
    scale = q.params.get("scale")
    factor = torch.tensor(0.75) if scale is None else torch.full_like(scale, 0.75)
    moved = QTensor(format, q.codes, format.rescaled(q.params, factor))
    assert same(QTensor.from_arrays(format, moved.pack(), q.shape).params, moved.params)
    if not same(moved.params, q.params):
        coarsest = 2.0**-4 if format.name == "nvfp4" else 2.0**-8  # half a unit in the last place: E4M3, BF16
        wanted, reach = q.dequantize() * 0.75, float(q.dequantize().abs().max())
        assert (moved.dequantize() - wanted).abs().max() <= coarsest * reach


def check_plain(format: Format) -> None:
    """The reference rounding is made of codes and params that the format can pack."""
    w = weights(3, width(format, 96))
    q = QTensor(format, *format.plain(w))
    back = QTensor.from_arrays(format, q.pack(), q.shape)
    assert torch.equal(back.dequantize(), q.dequantize())


# Names


def check_description(format: Format) -> None:
    """Name, cells and levels agree with one another, and the name finds the format."""
    assert set(format.cells) <= set("SEMIT")
    assert format.summary
    assert formats.format_named(format.name) == format == formats.FORMATS[format.name]
    assert str(format) == format.name
    if format.levels is None:
        return
    assert format.levels.dtype == torch.float32
    assert torch.equal(format.levels, format.levels.unique())
    assert len(format.levels) <= len(all_codes(format, torch.uint8))


CHECKS: Mapping[str, Callable[[Format], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
