"""A program as JSON and a list of arrays, and back: every dataclass by its name and fields, arrays by their number.

A weight that two ops share (tied embeddings) is written once and shared again when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import numpy as np

from fewbits.runtime import ops, tiles
from fewbits.runtime.ops import Program
from fewbits.runtime.tiles import Array, Floats, Tiles

Json: TypeAlias = Any

KIND = "is"
"""The key under which a dataclass's name stands; no field is called so."""
CLASSES: dict[str, type] = {
    found.__name__: found
    for module in (ops, tiles)
    for found in vars(module).values()
    if isinstance(found, type) and is_dataclass(found)
}


def encode(program: Program, number: Callable[[Array], int]) -> Json:
    """The program's JSON; `number` is asked for the number of each array."""
    weights: list[Json] = []
    seen: dict[int, int] = {}

    def weight(value: Tiles | Floats) -> Json:
        if id(value) not in seen:
            seen[id(value)] = len(weights)
            weights.append(plain(value))
        return {"weight": seen[id(value)]}

    def plain(value: Any) -> Json:
        return {KIND: type(value).__name__} | {f.name: encoded(getattr(value, f.name)) for f in fields(value)}

    def encoded(value: Any) -> Json:
        if isinstance(value, np.ndarray):
            return {"array": number(value)}
        if isinstance(value, Tiles | Floats):
            return weight(value)
        if is_dataclass(value):
            return plain(value)
        if isinstance(value, dict):
            return {"items": value}
        return [encoded(part) for part in value] if isinstance(value, tuple) else value

    return {"program": plain(program), "weights": weights}


def decode(data: Json, arrays: Sequence[Array]) -> Program:
    """The inverse of `encode`."""
    weights: list[Any] = []

    def plain(value: Json) -> Any:
        return CLASSES[value[KIND]](**{key: decoded(part) for key, part in value.items() if key != KIND})

    def decoded(value: Json) -> Any:
        if isinstance(value, list):
            return tuple(decoded(part) for part in value)
        if not isinstance(value, dict):
            return value
        if KIND in value:
            return plain(value)
        ((key, inner),) = value.items()
        return inner if key == "items" else (weights if key == "weight" else arrays)[inner]

    weights.extend(plain(value) for value in data["weights"])
    program: Program = plain(data["program"])
    return program
