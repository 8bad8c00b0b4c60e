"""Figures of size against divergence: what stands in them, and what they refuse."""

from __future__ import annotations

import builtins
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewbits.cli._frontier import draw_image, draw_terminal
from fewbits.errors import FewbitsError, OutputError
from fewbits.report.axes import axes_of
from fewbits.report.labels import Box, place
from fewbits.results import FrontierPoint

PLANS = [FrontierPoint(f"{n} GB", n * 10**9, 2.0**-n, "plan", n % 2 == 0) for n in range(2, 9)]
PRESET = FrontierPoint("Q4_K_M", 4_800_000_000, 0.12, "preset", True)
PEER = FrontierPoint("GPTQ", 4_500_000_000, 0.3, "peer", True)
POINTS = [*PLANS, PRESET, PEER]


def test_the_terminal_has_axes_a_frontier_markers_and_names() -> None:
    drawn = draw_terminal(POINTS, 90, 24)
    lines = drawn.splitlines()
    assert len(lines) == 24
    assert max(map(len, lines)) <= 90
    assert lines[0] == "divergence from the original, nats per token"
    assert lines[-2].strip() == "size, GB"
    plot = "\n".join(lines[1:-1])
    assert (plot.count("●"), plot.count("○"), plot.count("◆"), plot.count("■")) == (4, 3, 1, 1)
    assert "◆ Q4_K_M" in plot
    assert "■ GPTQ" in plot
    assert lines[-1] == "● fewbits plan   ◆ llama.cpp preset   ■ other program   ○◇□ predicted"


def test_markers_lie_where_the_ticks_say() -> None:
    """A marker at 4 GB stands above the tick of 4 GB, one at 0.1 nats in the line of 0.1."""
    lines = draw_terminal([replace(PEER, nbytes=4 * 10**9, divergence=0.1), *PLANS], 90, 24).splitlines()
    edge = next(line for line in lines if "└" in line)
    labels = lines[lines.index(edge) + 1]
    marked = next(line for line in lines if "■" in line)
    assert marked.lstrip().startswith("0.1 ┤")
    assert edge[marked.index("■")] == "┬"
    assert labels[marked.index("■")] == "4"


def test_the_frontier_is_drawn_from_each_plan_to_the_next_larger_one() -> None:
    """In any order of the points: every column between two plans has a piece of it."""
    lines = draw_terminal(PLANS[::-1], 90, 24).splitlines()[1:-4]
    columns = {x for line in lines for x, cell in enumerate(line) if cell in "●○" or 0x2800 < ord(cell) < 0x2900}
    assert columns == set(range(min(columns), max(columns) + 1))


def test_names_without_room_are_listed_below_with_where_they_lie() -> None:
    crowd = [replace(PEER, name=f"program number {i}", divergence=0.3 + i / 1e4) for i in range(12)]
    drawn = draw_terminal([*PLANS, *crowd], 60, 12)
    assert all(point.name in drawn for point in crowd)
    assert "without room for their names:\n■ program" in drawn
    assert max(map(len, drawn.splitlines())) <= 60


@pytest.mark.parametrize("points", [[PRESET], [PRESET, PRESET], [replace(PEER, nbytes=812_000_000, divergence=1e-6)]])
def test_one_place_is_enough_for_both_axes(points: list[FrontierPoint]) -> None:
    across, up = axes_of(points, across=6, up=8)
    for axis, value in ((across, points[0].nbytes), (up, points[0].divergence)):
        assert 0 < axis.at(value) < 1
        assert len(axis.ticks) >= 2
        assert (min(axis.ticks), max(axis.ticks)) == (axis.low, axis.high)
    assert re.search(r"size, (MB|GB)", draw_terminal(points, 60, 12))


@pytest.mark.parametrize("up", [4, 8, 16])
@pytest.mark.parametrize("least", [0.5, 0.03, 1e-5])
def test_ticks_of_divergence_are_no_more_than_asked_for(least: float, up: int) -> None:
    _, axis = axes_of([PRESET, replace(PRESET, divergence=least)], across=6, up=up)
    assert 2 <= len(axis.ticks) <= max(up, 6)
    assert axis.at(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "there are no points to draw"),
        ([replace(PEER, divergence=math.nan)], "point GPTQ: its divergence is nan, which must be above 0"),
        ([replace(PEER, divergence=math.inf)], "its divergence is inf"),
        ([replace(PEER, divergence=0.0)], "its divergence is 0.0"),
        ([replace(PEER, nbytes=0)], "its size is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(points: list[FrontierPoint], message: str, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=message):
        draw_terminal(points, 90, 24)
    with pytest.raises(FewbitsError, match=message):
        draw_image(points, tmp_path / "figure.png")


def test_a_terminal_too_small_is_refused() -> None:
    with pytest.raises(FewbitsError, match="30 × 24 characters; it needs 60 × 12"):
        draw_terminal(POINTS, 30, 24)


def test_a_name_goes_where_it_covers_least() -> None:
    marker, inside = Box(50, 50, 2, 2), Box(0, 0, 100, 100)
    assert place(marker, 10, 2, [marker], inside) == Box(52, 50, 10, 2)
    assert place(marker, 10, 2, [marker, Box(55, 50, 2, 2)], inside) == Box(40, 50, 10, 2)
    assert place(Box(95, 50, 2, 2), 10, 2, [], inside) == Box(85, 50, 10, 2)


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_the_suffix_says_what_kind_of_picture(suffix: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"figure{suffix}"
    draw_image(POINTS, path, "A title", "A caption")
    assert path.read_bytes().startswith(start)


def test_the_picture_has_axes_names_title_and_caption(tmp_path: Path) -> None:
    """Matplotlib writes each text into an SVG as a comment, and the same figure as the same bytes."""
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    draw_image(POINTS, first, "Smaller", "Measured on a Monday")
    draw_image(POINTS, second, "Smaller", "Measured on a Monday")
    written = set(re.findall(r"<!-- (.*?) -->", first.read_text(encoding="utf-8")))
    kinds = {"fewbits plan", "llama.cpp preset", "other program", "hollow: predicted"}
    axes = {"size, GB", "divergence from the original, nats per token", "4", "0.1"}
    assert kinds | axes | {"Q4_K_M", "GPTQ", "Smaller", "Measured on a Monday"} <= written
    assert not {plan.name for plan in PLANS} & written
    assert first.read_bytes() == second.read_bytes()


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=r"'\.bmp' is no kind of picture; it must be \.png, \.svg, \.pdf"):
        draw_image(POINTS, tmp_path / "figure.bmp")


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match=r"figure .*cannot be written: No such file"):
        draw_image(POINTS, tmp_path / "nowhere" / "figure.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(FewbitsError, match=r"needs matplotlib; pip install 'fewbits\[plot\]'"):
        draw_image(POINTS, tmp_path / "figure.png")
