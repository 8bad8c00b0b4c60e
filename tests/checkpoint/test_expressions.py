"""Expressions of configurations match what `re` matches, and none takes for ever."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.checkpoint import _expressions
from fewbits.checkpoint._expressions import matches

NAMES = ["", "a", "aab", "b1", "model.layers.10.mlp.up_proj", "model.layers.1.attn", "a\n", "A_1 é"]
EXPRESSIONS = [
    *(
        "",
        "ab|aa",
        "(a|b)+$",
        "(?:a|ab)(?:b|$)",
        "a{2}b",
        "a{1,}?",
        r"\w+$",
        r"\S+$",
        "[^a]",
        r"[^\d]+",
        r"a\Z",
        r"\bm",
    ),
    *(r".*\d{2}\.", "(?!a)", r".*(?<=layers\.)10\b", r"model\.layers\.(?!1\b).*", r"(\w+\.?)+$", "(?i)MODEL", "é|A"),
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_it_is_what_re_matches(expression: str) -> None:
    for name in NAMES:
        assert matches(expression, name) == (re.match(expression, name) is not None), name


PARTS = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "^", "$", r"\b", "", "(?=a)", "(?!b)"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("({0[0]}|{0[1]})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map("({0[0]}){0[1]}".format),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(expression=PARTS, name=st.text("ab", max_size=6))
def test_any_expression(expression: str, name: str) -> None:
    assert matches(expression, name) == (re.match(expression, name) is not None)


@pytest.mark.parametrize("expression", ["(a|a)*b", r"(\w+\.?)*!$", "(.*)*(.*)*x$", ".*" * 30 + "!"])
def test_what_takes_for_ever_elsewhere_is_answered(expression: str) -> None:
    """`re` would need 2^60 steps, or 60^30."""
    assert not matches(expression, "a" * 60 + "-")


def test_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four runs of 5000 characters are divided in some 5000^4 ways."""
    monkeypatch.setattr(_expressions, "SECONDS", 0.05)
    with pytest.raises(ValueError, match=r"takes more than 0\.05 seconds .* without repeats beside"):
        matches("(.*)(.*)(.*)(.*)[j-k]$", "a" * 5000)


@pytest.mark.parametrize("expression", ["(", "*", "(" * 5000 + ")" * 5000])
def test_refusals(expression: str) -> None:
    with pytest.raises(ValueError, match="no valid expression"):
        matches(expression, "aaa")
