"""The page: whole, readable without scripts or a network, safe with anybody's names, and no larger than it must be."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from samples import bare, whole

from fewbits.findings import Absent
from fewbits.report.page import page

VOID = {"meta", "link", "br", "rect", "circle", "line", "path", "polyline", "polygon"}
REQUESTS = {"src", "srcset", "poster", "data", "action", "background"}


class Outline(HTMLParser):
    """Elements with their attributes, in order; raises where one is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or (tag not in ("meta", "link", "br") and self.get_starttag_text()[-2] != "/"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text += data

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.elements if tag in tags]


@pytest.fixture(params=["bare", "whole"])
def drawn(request: pytest.FixtureRequest) -> str:
    return page({"bare": bare, "whole": whole}[request.param]())


def test_every_element_is_closed_and_every_name_is_one(drawn: str) -> None:
    outline = Outline(drawn)
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert max(Counter(ids).values()) == 1
    links = {(attrs["href"] or "").removeprefix("#") for attrs in outline.named("a")}
    assert links == set(ids)
    assert {attrs["aria-labelledby"] for attrs in outline.named("section")} == set(ids)


def test_nothing_is_asked_of_a_network(drawn: str) -> None:
    outline = Outline(drawn)
    assert not outline.named("script", "iframe", "object", "embed", "img", "base")
    for tag, attrs in outline.elements:
        assert not REQUESTS & attrs.keys(), (tag, attrs)
        assert re.fullmatch(r"#\w+|data:,", attrs.get("href") or "#a"), attrs
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in drawn
    assert "@import" not in drawn
    assert "http" not in drawn


def test_it_can_be_read_by_those_who_do_not_see_it(drawn: str) -> None:
    outline = Outline(drawn)
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in outline.named("svg"))
    assert len(outline.named("caption")) == len(outline.named("table"))
    assert all(attrs.get("scope") in ("row", "col") for attrs in outline.named("th"))
    assert ("html", {"lang": "en"}) in outline.elements


def test_what_is_missing_is_said_in_a_sentence() -> None:
    text = Outline(page(bare())).text
    for said in bare().missing.values():
        assert said in text
    assert "None" not in text


def test_a_whole_report_has_everything() -> None:
    outline = Outline(page(whole()))
    text = outline.text
    for said in (
        "tiny in 8.37 bits a weight",
        "0.012",
        "92.5",
        "calibrated on",
        "c.txt, 8 windows",
        "0.25 joules a token",
        "package-0, dram",
        "fewbits quantize /home/me/tiny tiny-int4 --bpw 4.25",
        "torch 2.13.0",
        "lm_head.weight",
        "compressed-tensors reads the same numbers",
        "vllm serve tiny-int4",
        "␣time",
    ):
        assert said in text, said
    # frontier, memory and losses twice (wide and narrow), two maps, a line by layer, a histogram, three of predictions
    assert len(outline.named("svg")) == 3 * 2 + 2 + 1 + 1 + 3


def test_a_broken_proof_is_not_hidden() -> None:
    broken = replace(whole(), verification=replace(whole().verification, mismatches=("a.weight: the bytes differ",)))
    text = Outline(page(broken)).text
    assert "1 tensor not as meant: a.weight: the bytes differ" in text


def test_text_that_was_calibrated_on_is_told() -> None:
    assert "calibrated on this very file" in page(whole(on_calibration_text=True))
    assert "calibrated on this very file" not in page(whole())


def test_names_are_text_and_nothing_else() -> None:
    evil = '<script>alert(1)</script>"&\x00'
    report = whole()
    tensors = tuple(replace(t, name=evil + t.name, part=evil + t.part, reason=evil) for t in report.tensors)
    report = replace(report, name=evil, source=evil, tensors=tensors, absent=(Absent(evil, "tied", evil),))
    report = replace(report, made_by=evil, missing={"speed": evil}, speed=None, license=evil, method=evil)
    outline = Outline(page(report))
    assert not outline.named("script")
    assert '<script>alert(1)</script>"&␀' in outline.text


def test_a_large_model_stays_below_half_a_megabyte() -> None:
    assert len(page(whole(layers=32)).encode()) < 500_000


def test_a_passage_is_coloured_by_steps() -> None:
    passage = re.search(r'<div class="passage">(.*?)</div>', page(whole()), re.DOTALL)
    assert passage is not None
    assert [found or "" for found in re.findall(r'<span(?: class="([^"]*)")?', passage[1])] == [
        "",
        "",
        "h3 parted",
        "h5",
    ]
    assert "\n&lt;b&gt;time" in passage[1]
