"""Expressions of configurations match what `re` matches, and none takes more steps than allowed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.checkpoint import _expressions
from fewbits.checkpoint._expressions import matches

NAMES = ["", "a", "ab", "aab", "b1", "model.layers.10.mlp.up_proj", "model.layers.1.attn", "\n", "a\n", "A_1 é"]
EXPRESSIONS = [
    *(
        "",
        "a",
        "ab|aa",
        "a*",
        "(a|b)+$",
        "(?:a|ab)(?:b|$)",
        "a?b",
        "a{2}b",
        "a{1,}?",
        ".",
        r"\w+$",
        r"\W",
        r"\s",
        r"\S+$",
    ),
    *(
        "[ab]+$",
        "[^a]",
        r"[\d_]",
        r"[^\d]+",
        r"^a$",
        r"a\Z",
        r"\Aa",
        r"\bm",
        r"a\b",
        r"\Ba",
        r".*\d{2}\.",
        r"(?!a)",
        r"(?=ab)a",
    ),
    *(
        r".*(?<=layers\.)10\b",
        r".*(?<!layers\.)mlp",
        r"(?P<x>a)b",
        r"model\.layers\.(?!1\b).*",
        r"(\w+\.?)+$",
        r"(a*)*b",
    ),
    *(
        r"(a|a)*$",
        r"(a{0,3}){0,4}b",
        r"((a|b)?){3}$",
        r"(.*)(.*)(.*)(.*)j$",
        r"(a?){20}b",
        r"[a-c]+",
        "é|A",
        r"\D+\d\D",
    ),
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("tried", [0, 100_000])
def test_by_sets_and_by_re_it_is_the_same(expression: str, tried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_expressions, "TRIED", tried)  # 0: everything goes by sets
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
    places = _expressions._Places(name)
    found = bool(places.sequence(list(_expressions.parser.parse(expression)), 0))
    assert found == (re.match(expression, name) is not None)


@pytest.mark.parametrize(
    "expression", ["(a+)+$", r"(\w+\.?)*!$", "(a|a)*b", "(.*)*(.*)*x$", "(a?){60}a{60}", ".*" * 30 + "!"]
)
def test_what_takes_for_ever_elsewhere_takes_few_steps(expression: str) -> None:
    """`re` would need 2^50 steps or 50^30; here parts × length² are the most, which is within the limit."""
    assert not matches(expression, "a" * 50 + "-")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(", "no valid expression"),
        ("a{2}{3", ""),
        ("*", "no valid expression"),
        ("(" * 5000 + ")" * 5000, "no valid expression"),
        ("(?i)a", "has flags"),
        (r"(a)\1", "groupref"),
        ("(?:(?i:a)+)+", "subpattern"),
        ("(?>a)", "atomic_group"),
        ("a++", "possessive_repeat"),
    ],
)
def test_refusals(expression: str, message: str) -> None:
    if not message:
        assert matches(expression, "aa{3")
        return
    with pytest.raises(ValueError, match=message):
        matches(expression, "aaa")


def test_a_name_too_long_for_the_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 200000 steps on a name of 5000"):
        matches("(.*.*)*x", "a" * 5000)
