"""The compiled columns against the reference, for every format that can be rounded by columns."""

from __future__ import annotations

import importlib.util
import logging
import shutil

import pytest
import torch

from fewbits import extensions
from fewbits.formats import FORMATS, Grouped
from fewbits.kernels import _compiled
from fewbits.kernels.round_columns import at_positions, reference, round_columns

NAMES = [
    name
    for name, f in FORMATS.items()
    if isinstance(f, Grouped) and getattr(f, "columnwise", False) and f.levels is not None
]


def case(name: str, columns: int, rows: int, share: float):
    """A matrix [columns, rows] with a dead and a large row, the params of its columns, and feedback of some size."""
    generator = torch.Generator().manual_seed(columns + rows)
    format = FORMATS[name]
    columns = max(columns, format.span if isinstance(format.span, int) else 1)
    w = torch.randn(columns, rows, generator=generator) * 0.02
    w[:, 0] *= 100
    w[:, rows // 2] = 0
    params = at_positions(format, format.fit(w.T.contiguous(), search=True), torch.arange(columns))
    feedback = torch.randn(columns, columns, generator=generator).triu(1) * share
    return format, w, params, feedback


@pytest.fixture(autouse=True)
def built(request):
    if "compiler" not in request.node.name and _compiled.compiled() is None:
        pytest.skip("fewbits was built without a compiler")


@pytest.mark.parametrize("name", NAMES)
def test_numbers_without_feedback_are_the_nearest(name):
    format, w, params, feedback = case(name, 128, 70, 0.0)
    codes, moved = round_columns(format, w.clone(), feedback, params, w)
    nearest = format.decode_at(format.round_at(w, params), params)
    # halfway between two levels either is right: the distance, not the level, must be the same, to rounding errors of w
    close = 4 * torch.finfo(torch.float32).eps * w.abs().amax()
    assert ((w - nearest).abs() - moved.abs()).abs().max() <= close
    assert torch.equal(moved, w - format.decode_at(codes, params))


@pytest.mark.parametrize(
    "name", ["int4-g128", "int3-asym-g64", "nf4", "fp8-e4m3", "ternary-g64", "nvfp4", "q4_1", "int8", "q4_k", "iq4_xs"]
)
@pytest.mark.parametrize(("columns", "rows"), [(32, 1), (32, 64), (64, 65), (160, 7), (128, 200)])
def test_each_column_is_rounded_at_what_those_before_it_left(name, columns, rows):
    format, w, params, feedback = case(name, columns, rows, 0.5 / columns)
    columns = len(w)
    codes, moved = round_columns(format, w.clone(), feedback, params, w)
    assert codes.dtype == reference(format, w.clone(), feedback, params, w)[0].dtype
    assert codes.shape == moved.shape == (columns, rows)
    assert torch.equal(moved, w - format.decode_at(codes, params))
    # What each column should have been rounded from, given what was done to those before it, in float64.
    shares = feedback.double() @ moved.double()
    targets = w.double() + shares
    chosen = format.decode_at(codes, params).double()
    nearest = format.decode_at(format.round_at(targets.float(), params), params).double()
    # n terms summed in float32 are off by n units in the last place of the sum of their sizes; so is a scaled target.
    sizes = w.double().abs() + feedback.double().abs() @ moved.double().abs() + chosen.abs()
    bound = 2 * (columns + 4) * 2.0**-24 * sizes
    assert ((targets - chosen).abs() <= (targets - nearest).abs() + bound).all()


def test_threads_do_not_change_a_bit(monkeypatch):
    format, w, params, feedback = case("int4-g128", 128, 1000, 0.01)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(round_columns(format, w.clone(), feedback, params, w))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_it_is_built_where_there_is_a_compiler():
    """Otherwise every test here would be skipped, and nobody would see that the build is broken."""
    assert importlib.util.find_spec("fewbits.kernels._core") is not None or not any(map(shutil.which, ("c++", "g++")))


def test_shapes_that_do_not_fit_are_refused():
    core = _compiled.compiled()
    w, one = torch.zeros(4, 8), torch.ones(1, 8)
    levels, none = torch.tensor([-1.0, 0.0, 1.0]), torch.empty(0)
    with pytest.raises(ValueError, match="feedback"):
        core.round_columns(w, torch.zeros(3, 4), one, one, levels, none, w, w.clone(), 1)
    with pytest.raises(ValueError, match="midpoints"):
        core.round_columns(w, torch.zeros(4, 4), one, one, levels, torch.zeros(2), w, w.clone(), 1)
    with pytest.raises(TypeError):
        core.round_columns(w.double(), torch.zeros(4, 4), one, one, levels, none, w, w.clone(), 1)


def test_the_reference_runs_where_nothing_is_compiled(monkeypatch, caplog):
    monkeypatch.setenv(extensions.SWITCH, "0")
    extensions.extension.cache_clear()
    try:
        format, w, params, feedback = case("int4-g128", 32, 8, 0.01)
        with caplog.at_level(logging.WARNING):
            codes, _ = round_columns(format, w.clone(), feedback, params, w)
            round_columns(format, w.clone(), feedback, params, w)
        assert torch.equal(codes, reference(format, w.clone(), feedback, params, w)[0])
        assert caplog.text.count("slower references") == 1
    finally:
        extensions.extension.cache_clear()
