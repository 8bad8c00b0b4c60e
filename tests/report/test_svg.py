"""Elements, text that is cut and shown, and drawings that keep their labels inside."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from drawn import assert_inside, labels, parsed
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.report.svg import Drawing, element, fitted, number, shown, text_width


def test_an_element_is_written_as_by_hand() -> None:
    assert element("rect", x=1.04, y_=2.0, class_="a b", fill_opacity=None) == '<rect x="1" y="2" class="a b"/>'
    assert element("g", "<a/>", stroke_width=0.26) == '<g stroke-width="0.3"><a/></g>'
    assert element("text", label='"<&') == '<text label="&quot;&lt;&amp;"/>'


def test_numbers_have_a_tenth_and_no_negative_nothing() -> None:
    assert [number(x) for x in (0.0, -0.01, -0.04, 10.0, -10.05, 3.14159)] == ["0", "0", "0", "10", "-10.1", "3.1"]


@settings(deadline=None)
@given(st.text())
def test_any_text_is_xml(text: str) -> None:
    drawing = Drawing(300, 100, text)
    drawing.text(10, 20, text)
    drawing.add("circle", tip=text, cx=1.0, cy=1.0, r=1.0)
    root = parsed(drawing.render())
    assert root.attrib["aria-label"] == shown(text).replace("\r", "\n") or text


def test_control_characters_are_seen() -> None:
    assert shown("a\n\tb\x00\ud800\x85") == "a⏎⇥b␀��"
    ET.fromstring(f"<a>{shown(''.join(map(chr, range(0x20))))}</a>")


@settings(deadline=None)
@given(st.text(min_size=1), st.floats(0, 400))
def test_a_text_is_cut_to_its_width(text: str, width: float) -> None:
    cut = fitted(text, width)
    assert text_width(cut) <= width
    assert cut == text or text.startswith(cut.removesuffix("…"))


def test_wide_characters_are_wider() -> None:
    assert text_width("iii") < text_width("aaa") < text_width("AAA") < text_width("漢漢漢")
    assert text_width("abc", 26) == 2 * text_width("abc", 13)


@settings(deadline=None)
@given(
    st.text(max_size=60),
    st.floats(-500, 1500),
    st.floats(-500, 1500),
    st.sampled_from(("start", "middle", "end")),
    st.integers(60, 300).map(lambda tenths: tenths / 10),
)
def test_no_label_leaves_the_drawing(text, x, y, anchor, size) -> None:
    drawing = Drawing(320, 120, "")
    drawing.text(x, y, text, anchor=anchor, size=size)
    assert_inside(parsed(drawing.render()))


def test_a_label_that_fits_stays_where_it_is() -> None:
    drawing = Drawing(320, 120, "")
    drawing.text(100, 50, "here", anchor="middle")
    (label,) = labels(parsed(drawing.render()))
    assert (label.left + label.right) / 2 == 100
    assert label.text == "here"
