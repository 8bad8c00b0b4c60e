"""Regular expressions of configurations, matched in a time that no expression can make long.

Python's `re` tries alternatives one after the other and goes back where one fails, which takes 2^n steps for `(a+)+$`
on n letters that are no match. Expressions come with checkpoints, from anybody. So `re` is asked only where the number
of ways to go back is small, which is nearly always. Everything else is matched by sets: what a part of an expression
can reach from one place of the name is worked out once and kept, so that parts × length² steps are enough (Thompson
1968, "Regular Expression Search Algorithm", with the parsed expression in place of an automaton). It finds the same:
a match exists or it does not, in whatever order one looks for it. Groups that are referred to have no such sets;
expressions with these, with flags or with possessive repeats are refused, and so are names too long for the steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from re import _constants as ops  # type: ignore[attr-defined]  # what `re` itself parses with
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, TypeAlias

Item: TypeAlias = tuple[Any, Any]
TRIED = 100_000
"""Ways to go back in which `re` is quick."""
STEPS = 200_000
CATEGORIES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    ops.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    ops.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)


def matches(expression: str, name: str) -> bool:
    """Whether `re.match(expression, name)` finds something. Raises ValueError for what is no expression, or refused."""
    try:
        compiled, items = _parsed(expression)
        if _ways(items, len(name)) <= TRIED:
            return compiled.match(name) is not None
        return bool(_Places(name).sequence(items, 0))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{expression[:200]!r} is no valid expression ({error})") from error


@lru_cache(maxsize=1024)
def _parsed(expression: str) -> tuple[re.Pattern[str], Sequence[Item]]:
    compiled = re.compile(expression)
    if compiled.flags != re.UNICODE:
        raise ValueError(f"{expression[:200]!r} has flags, which fewbits does not evaluate")
    return compiled, list(parser.parse(expression))


def _ways(items: Sequence[Item], length: int) -> float:
    """At most so many ways to go through these items on a name of that length."""
    ways = 1.0
    for op, value in items:
        if op in REPEATS:
            least, most, body = value
            inside = _ways(body, length)
            if most > 1 and inside > 1:
                return float("inf")
            ways *= inside * (1 if least == most else min(int(most), length) + 1)
        elif op is ops.BRANCH:
            ways *= sum(_ways(body, length) for body in value[1])
        elif op is ops.SUBPATTERN:
            ways *= _ways(value[-1], length)
        elif op in (ops.ASSERT, ops.ASSERT_NOT):
            ways *= _ways(value[1], length)
        elif op in (ops.GROUPREF, ops.GROUPREF_EXISTS, ops.ATOMIC_GROUP, ops.POSSESSIVE_REPEAT):
            return float("inf")
    return ways


class _Places:
    """Where each part of an expression can end in a name, by where it begins."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[tuple[int, int], set[int]] = {}
        self._steps = 0

    def sequence(self, items: Sequence[Item], start: int) -> set[int]:
        """Where items that follow each other can end."""
        reached = {start}
        for item in items:
            reached = set().union(*(self._ends(item, at) for at in reached))
        return reached

    def _ends(self, item: Item, at: int) -> set[int]:
        found = self._known.get((id(item), at))
        if found is None:
            found = self._known[id(item), at] = self._found(*item, at)
        self._steps += 1 + len(found)
        if self._steps > STEPS:
            raise ValueError(f"an expression takes more than {STEPS} steps on a name of {len(self._name)} characters")
        return found

    def _found(self, op: Any, value: Any, at: int) -> set[int]:
        if op in REPEATS:
            least, most, body = value
            return self._repeated(least, most, body, at)
        if op is ops.BRANCH:
            return set().union(*(self.sequence(body, at) for body in value[1]))
        if op is ops.SUBPATTERN and not value[1] and not value[2]:
            return self.sequence(value[3], at)
        if op in (ops.ASSERT, ops.ASSERT_NOT):
            direction, body = value
            return {at} if self._stands(direction, body, at) == (op is ops.ASSERT) else set()
        if op is ops.AT:
            return {at} if self._at(value, at) else set()
        return {at + 1} if at < len(self._name) and _is(op, value, self._name[at]) else set()

    def _repeated(self, least: int, most: int, body: Sequence[Item], at: int) -> set[int]:
        """More than a name's length of times reaches nothing new."""
        rounds = len(self._name) + 1
        reached, found = {at}, set[int]()
        for count in range(min(int(most), rounds) + 1):
            if count >= min(least, rounds):
                reached -= found
                found |= reached
            if not reached:
                break
            reached = set().union(*(self.sequence(body, start) for start in reached))
        return found

    def _stands(self, direction: int, body: Any, at: int) -> bool:
        """Whether what is looked for lies ahead, or (direction −1) behind, where its length is fixed."""
        if direction > 0:
            return bool(self.sequence(body, at))
        start = at - int(body.getwidth()[0])
        return start >= 0 and at in self.sequence(body, start)

    def _at(self, where: Any, at: int) -> bool:
        end = len(self._name)
        if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return at == 0
        if where is ops.AT_END:
            return at == end or (at == end - 1 and self._name[at] == "\n")
        if where is ops.AT_END_STRING:
            return at == end
        word = CATEGORIES[ops.CATEGORY_WORD]
        between = (at > 0 and word(self._name[at - 1])) != (at < end and word(self._name[at]))
        return bool(between == (where is ops.AT_BOUNDARY))


def _is(op: Any, value: Any, character: str) -> bool:
    """Whether one character is what an item asks for."""
    if op is ops.LITERAL:
        return bool(ord(character) == value)
    if op is ops.NOT_LITERAL:
        return bool(ord(character) != value)
    if op is ops.ANY:
        return character != "\n"
    if op is ops.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    if op is ops.CATEGORY:
        return CATEGORIES[value](character)
    if op is ops.IN:
        negated = bool(value[0][0] is ops.NEGATE)
        return any(_is(part, choice, character) for part, choice in value[negated:]) != negated
    raise ValueError(f"it has {str(op).lower()}, which fewbits does not evaluate")
