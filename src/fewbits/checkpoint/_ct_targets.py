r"""Lists of module names as few regular expressions.

A model with experts has tens of thousands of linear layers, and the library matches each against each target. Names
differ in their numbers alone, so names of one shape (`model.layers.#.mlp.experts.#.up_proj`) become

    ^model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj$        where the whole shape is in one list,
    ^model\.layers\.(?:0|3)\.mlp\.experts\.\d+\.up_proj$     where some layers are, each with all it has,
    ^model\.layers\.(?:0|3)\.mlp\.experts\.(?:1|2)\.up_proj$  where they have the same part of it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import product

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def compact(lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """For each list of names, targets (`re:…`) that match exactly its names among the names of all lists."""
    every: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for names in lists:
        for name in names:
            every[_shape(name)].add(_numbers(name))
    return [_targets(names, every) for names in lists]


def _targets(names: Sequence[str], every: dict[str, set[tuple[str, ...]]]) -> list[str]:
    mine: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        mine[_shape(name)].add(_numbers(name))
    return [target for shape, numbers in mine.items() for target in _cover(shape, numbers, every[shape])]


def _cover(shape: str, mine: set[tuple[str, ...]], every: set[tuple[str, ...]]) -> list[str]:
    if mine == every:
        return [_expression(shape, [r"\d+"] * shape.count("#"))]
    by_rest: dict[frozenset[tuple[str, ...]], list[str]] = defaultdict(list)
    for first in sorted({n[0] for n in mine}, key=int):
        by_rest[frozenset(n[1:] for n in mine if n[0] == first)].append(first)
    return [target for rest, firsts in by_rest.items() for target in _with_rest(shape, firsts, rest, every)]


def _with_rest(
    shape: str, firsts: list[str], rest: frozenset[tuple[str, ...]], every: set[tuple[str, ...]]
) -> list[str]:
    """Targets for every one of `firsts` followed by every one of `rest`."""
    columns = [sorted(set(column), key=int) for column in zip(*rest, strict=True)]
    if all(rest == {n[1:] for n in every if n[0] == first} for first in firsts):
        return [_expression(shape, [_any(firsts), *([r"\d+"] * len(columns))])]
    if set(product(*columns)) == rest:
        return [_expression(shape, [_any(firsts), *map(_any, columns)])]
    return [_expression(shape, [_any(firsts), *numbers]) for numbers in sorted(rest)]


def _any(numbers: Sequence[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"


def _expression(shape: str, numbers: Sequence[str]) -> str:
    pieces = [re.escape(piece) for piece in shape.split("#")]
    return "re:^" + "".join(a + b for a, b in zip(pieces, [*numbers, "$"], strict=True))


def _shape(name: str) -> str:
    return _NUMBER.sub("#", name)


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(_NUMBER.findall(name))
