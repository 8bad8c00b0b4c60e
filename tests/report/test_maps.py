"""Layers × parts, and the axes of figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import PARTS, tensors

from fewbits.report.axes import linear, logarithmic, within
from fewbits.report.maps import bits, errors, places


def test_parts_are_in_the_order_of_their_use() -> None:
    found = places(tuple(reversed(tensors(3))))
    assert found.layers == (0, 1, 2)
    assert found.parts == PARTS
    assert found.columns == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_names_that_would_be_the_same_stay_long() -> None:
    two = tensors(1)[1:3]
    found = places((replace(two[0], part="a.x"), replace(two[1], part="b.x")))
    assert found.columns == ("a.x", "b.x")


def test_cells_have_bits_and_errors_in_per_cent() -> None:
    found = places(tensors(2))
    assert bits(found)[0, 0].value == pytest.approx(4.5)
    assert bits(found)[1, 0].value == pytest.approx(3.5)
    assert errors(found)[1, 2].value == pytest.approx(6.1)
    assert "model.layers.1.self_attn.v_proj.weight" in errors(found)[1, 2].tip


def test_experts_share_a_cell() -> None:
    first, second = tensors(1)[1:3]
    experts = (
        replace(first, part="mlp.experts.*.up_proj", error=0.3, weights=3),
        replace(second, error=0.5, weights=1),
    )
    experts = (experts[0], replace(experts[1], part="mlp.experts.*.up_proj"))
    (cell,) = errors(places(experts)).values()
    assert cell.value == pytest.approx(100 * ((3 * 0.09 + 0.25) / 4) ** 0.5)
    assert "and 1 more" in cell.tip


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_even_axes_hold_their_numbers_at_round_ticks(low, span, about) -> None:
    outer, inner = linear("", low, low + span, about), within("", low, low + span, about)
    tiny = 1e-9 * max(abs(low), span)
    assert outer.low <= low + tiny
    assert outer.high >= low + span - tiny
    assert (inner.low, inner.high) == (low, low + span)
    assert all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in inner.ticks)
    assert len(inner.ticks) <= about + 1
    assert len(outer.ticks) <= about + 2


@settings(deadline=None)
@given(st.floats(1e-9, 1e3), st.floats(1.0, 1e9), st.integers(2, 10), st.booleans())
def test_logarithmic_axes_hold_their_numbers(low, factor, about, fine) -> None:
    axis = logarithmic("", low, low * factor, about, fine=fine)
    assert axis.low <= low
    assert axis.high >= low * factor
    assert all(0 <= axis.at(tick) <= 1 + 1e-9 for tick in axis.ticks)


def test_a_fine_axis_ends_near_its_numbers() -> None:
    axis = logarithmic("", 0.081, 0.137, 7, fine=True)
    assert (axis.low, axis.high) == (0.08, 0.15)
    assert list(axis.ticks.values()) == ["0.08", "0.1", "0.12", "0.15"]
