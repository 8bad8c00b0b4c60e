"""Figures: well-formed, with marks where the numbers say, and labels inside."""

from __future__ import annotations

import math

import pytest
from drawn import assert_inside, labels, marks, parsed, tips, turned
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import points

from fewbits.errors import FewbitsError
from fewbits.findings import Histogram
from fewbits.report.plots.bars import Bar, Stack, shares, stacks
from fewbits.report.plots.heat import Cell, heat
from fewbits.report.plots.histogram import histogram
from fewbits.report.plots.lines import Line, Note, lines
from fewbits.report.plots.scatter import scatter
from fewbits.results import FrontierPoint

TENTH = 0.11  # coordinates are rounded to a tenth
words = st.text(max_size=24)
positive = st.floats(1e-9, 1e9)


def ticks(root, axis: str) -> dict[float, float]:
    """Number written at a tick -> its place along an axis, by the labels."""
    found = {}
    for each in root.iter("text"):
        try:
            value = float((each.text or "").replace("−", "-"))
        except ValueError:
            continue
        anchor = each.get("text-anchor")
        if anchor == {"x": "middle", "y": "end"}[axis]:
            found[value] = float(each.attrib[axis])
    return found


def test_points_lie_where_their_numbers_say() -> None:
    root = parsed(scatter(points(), 960, 420, "sizes"))
    across, up = ticks(root, "x"), ticks(root, "y")
    (low, left), (high, right) = min(across.items()), max(across.items())
    (deep, bottom), (far, top) = min(up.items()), max(up.items())
    plans = {tip.text: mark for mark in marks(root, "circle", "plan") for tip in mark.iter("title")}
    mark = plans["this plan: 350 kB, 0.03 nats a token, expected"]
    x = left + (350 - low) / (high - low) * (right - left)
    y = bottom + math.log(0.03 / deep) / math.log(far / deep) * (top - bottom)
    assert float(mark.attrib["cx"]) == pytest.approx(x, abs=2 * TENTH)
    assert float(mark.attrib["cy"]) == pytest.approx(
        y - 0.35 * 13, abs=2 * TENTH
    )  # labels stand below their tick's line


def test_plans_are_joined_and_kinds_have_marks_of_their_own() -> None:
    root = parsed(scatter(points(), 960, 420, "sizes"))
    (line,) = root.iter("polyline")
    assert len(line.attrib["points"].split()) == 8
    assert len(marks(root, "path", "preset")) == 1
    assert len(marks(root, "rect", "measured")) == 1
    assert {"this plan", "Q4_K_M", "GPTQ"} <= {label.text for label in labels(root)}
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == "sizes"


def test_a_figure_without_points_is_refused() -> None:
    with pytest.raises(FewbitsError, match="no points"):
        scatter([], 960, 420, "")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            FrontierPoint,
            words,
            st.integers(1, 10**12),
            st.floats(1e-9, 20),
            st.sampled_from(("plan", "preset", "peer")),
            st.booleans(),
        ),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from((380.0, 960.0)),
)
def test_scatters_stay_inside(found, width) -> None:
    assert_inside(parsed(scatter(found, width, 400, "a figure")))


def test_a_map_has_each_number_and_the_largest_is_the_strongest() -> None:
    cells = {(i, j): Cell(3 + i + 10 * j, f"cell {i} {j}") for i in range(2) for j in range(2)}
    root = parsed(heat(["0", "1"], ["q_proj", "k_proj"], cells, 460, "bits", lambda v: f"{v:g}", "layer"))
    assert {"3", "4", "13", "14", "layer", "proj"} <= {label.text for label in labels(root)}
    shade = {tip: float(rect.attrib["fill-opacity"]) for rect in root.iter("rect") for tip in tips(rect)}
    assert sorted(shade, key=lambda tip: shade[tip]) == ["cell 0 0", "cell 1 0", "cell 0 1", "cell 1 1"]
    assert max(shade.values()) == 0.62


def test_columns_of_a_map_are_in_their_order() -> None:
    cells = {(0, j): Cell(float(j), str(j)) for j in range(7)}
    root = parsed(heat(["0"], [f"c{j}" for j in range(7)], cells, 460, "", str))
    lefts = [float(rect.attrib["x"]) for rect in root.iter("rect")]
    heads = sorted((label.left, label.text) for label in labels(root) if label.text.startswith("c"))
    assert lefts == sorted(lefts)
    assert [text for _, text in heads] == [f"c{j}" for j in range(7)]


def test_names_too_long_for_their_columns_rise_at_an_angle() -> None:
    names = [f"a_very_long_name_of_part_number_{j}" for j in range(14)]
    cells = {(0, j): Cell(1.0, "a cell") for j in range(14)}
    root = parsed(heat(["0"], names, cells, 460, "", str))
    assert len(turned(root)) == 14
    assert_inside(root)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90), st.lists(words, min_size=1, max_size=12), st.lists(positive, min_size=1, max_size=40))
def test_maps_stay_inside(rows, columns, values) -> None:
    places = [(i, j) for i in range(rows) for j in range(len(columns))]
    cells = {place: Cell(value, "a cell") for place, value in zip(places, values, strict=False)}
    names = [str(i) for i in range(rows)]
    assert_inside(parsed(heat(names, columns, cells, 460, "a map", lambda v: f"{v:.3g}", "layer")))


def test_a_line_goes_through_its_numbers() -> None:
    line = Line("loss", [(0.0, 1.0), (10.0, 0.5), (20.0, 0.25)], [0.1, 0.1, 0.1])
    root = parsed(lines([line], 460, 280, "", "steps", "loss", notes=[Note(10.0, 0.5, "half way")]))
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in marks(root, "circle", "accent")]
    across, up = ticks(root, "x"), ticks(root, "y")
    assert dots[1][0] == pytest.approx(across[10], abs=TENTH)
    assert dots[0][1] == pytest.approx(up[1] - 0.35 * 13, abs=TENTH)
    assert dots[1][1] - dots[0][1] == pytest.approx(2 * (dots[2][1] - dots[1][1]), abs=3 * TENTH)
    assert "loss: 0.5 ± 0.1 at 10 (loss; steps)" in tips(root)
    assert "half way" in {label.text for label in labels(root)}
    (band,) = root.iter("polygon")
    assert len(band.attrib["points"].split()) == 6


def test_on_a_logarithmic_scale_equal_factors_are_equal_steps() -> None:
    line = Line("loss", [(0.0, 1.0), (1.0, 0.1), (2.0, 0.01)])
    root = parsed(lines([line], 460, 280, "", "steps", "loss", log=True))
    y = [float(dot.attrib["cy"]) for dot in marks(root, "circle", "accent")]
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=2 * TENTH)


series = st.lists(st.tuples(st.floats(0, 1e6), positive), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(Line, words, series), min_size=1, max_size=3), st.booleans(), words)
def test_lines_stay_inside(found, log, note) -> None:
    x, y = found[0].points[0]
    drawn = lines(found, 380, 250, "lines", "steps", "loss", log=log, notes=[Note(x, y, note)])
    assert_inside(parsed(drawn))


def test_bars_are_as_high_as_their_shares() -> None:
    bars = [Bar(i / 10, (i + 1) / 10, i / 10, f"bar {i}") for i in range(11)]
    root = parsed(shares(bars, 460, 280, "", "probability", "%"))
    heights = [float(bar.attrib["height"]) for bar in marks(root, "rect", "bar")]
    assert heights[10] == pytest.approx(2 * heights[5], abs=2 * TENTH)
    assert heights[0] == 0
    assert_inside(root)


@settings(deadline=None)
@given(st.lists(st.builds(Stack, words, st.lists(st.tuples(words, positive), min_size=1, max_size=6)), min_size=1))
def test_stacks_share_a_scale_and_stay_inside(found) -> None:
    root = parsed(stacks(found, 380, "memory"))
    assert_inside(root)
    for rect in root.iter("rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= 380 + 1


def test_a_stack_twice_as_large_is_twice_as_long() -> None:
    root = parsed(stacks([Stack("a", [("x", 50.0), ("y", 50.0)]), Stack("b", [("z", 200.0)])], 400, ""))
    ends = [float(rect.attrib["x"]) + float(rect.attrib["width"]) for rect in root.iter("rect")]
    assert ends == [99, 199, 399]  # a unit of each part is the gap to the next


def level(shares_: tuple[float, ...], counts: tuple[int, ...]) -> Histogram:
    levels = tuple(float(i) for i in range(len(shares_)))
    return Histogram("a.weight", "int2", 100, -1.0, 4.0, counts, levels, shares_)


def test_sticks_stand_at_their_levels() -> None:
    root = parsed(histogram(level((0.1, 0.2, 0.4, 0.3), (1, 5, 3, 2)), 460, 220, "levels"))
    sticks = marks(root, "line", "stick")
    heights = [float(s.attrib["y1"]) - float(s.attrib["y2"]) for s in sticks]
    assert heights == pytest.approx([heights[0] * k for k in (1, 2, 4, 3)], abs=5 * TENTH)
    x = [float(s.attrib["x1"]) for s in sticks]
    assert x[1] == pytest.approx(ticks(root, "x")[1], abs=TENTH)
    assert "level 2: 40.00 % of the weights" in tips(root)
    assert len(list(root.iter("polygon"))) == 1
    assert_inside(root)


def test_without_levels_nothing_is_written_at_the_area() -> None:
    found = Histogram("a.weight", "fp8-e4m3", 100, -400.0, 400.0, (1, 5, 3, 2), (), ())
    root = parsed(histogram(found, 460, 220, ""))
    assert ticks(root, "y") == {}
    (area,) = root.iter("polygon")
    heights = [float(point.split(",")[1]) for point in area.attrib["points"].split()]
    assert 30 <= min(heights) < max(heights) == 220 - 44
    assert not marks(root, "line", "stick")


def test_without_the_original_there_is_no_area() -> None:
    root = parsed(histogram(level((0.5, 0.5), ()), 460, 220, ""))
    assert not list(root.iter("polygon"))
