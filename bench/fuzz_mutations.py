"""Damage for `fuzz_readers.py`: one checkpoint in, one that is wrong somewhere out, decided by a random generator.

Files are changed where damage is likely to matter: JSON by its values, safetensors by its header or in one of
its arrays (each as likely as any other, however small), GGUF mostly within its header, and every file by flipped, lost
and added bytes. What is put in is what readers fall for: numbers at the edges of integer types, values of another type,
names that are regular expressions which take for ever, JSON that is nested deeper than any stack.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = "\0deep\0"
"""Stands for lists nested beyond the recursion of any parser, until the JSON is text."""
DEPTH = 100_000
MOST = 1_000_000  # characters of a string
TWICE = "\0twice\0"
"""Stands before a key that is to be there a second time."""
EVIL = (
    "(a+)+$",
    r"-:^(\w+\.?)*!$",
    r"+:(.*)*(.*)*x$",
    r"re:(\w*\.?)*!$",
    "(",
    "-:[",
    "re:*",
    "(?<=a+)b",
    ".*" * 30 + "!",
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I8",
    "U8",
    "U32",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "BOOL",
    "F4",
    "",
)
EDGES = (
    0,
    1,
    -1,
    2,
    3,
    7,
    31,
    33,
    127,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**30,
    10**400,
)
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0.5,
    -1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "4",
    "\ud800",
    [],
    {},
    [[]],
    [0],
    {"a": 1},
)


def damaged(path: Path, rng: random.Random) -> str:
    """Change one to three things in a checkpoint, a folder or a file; what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(p for p in (path.rglob("*") if path.is_dir() else path.parent.iterdir()) if p.is_file())
        if files:
            done.append(_damage_file(rng.choice(files), rng))
    return "; ".join(done)


def _damage_file(file: Path, rng: random.Random) -> str:
    if rng.random() < 0.02:
        file.unlink()
        return f"{file.name} removed"
    data = file.read_bytes()
    ways: dict[str, Callable[[bytes, random.Random], bytes]] = {".json": _json, ".safetensors": _safetensors}
    special = ways.get(file.suffix, _gguf)
    way = special if rng.random() < 0.8 else _bytes
    try:
        found = way(data, rng)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):  # damaged before
        way, found = _bytes, _bytes(data, rng)
    file.write_bytes(found)
    return f"{file.name} by {way.__name__.strip('_')}"


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, lost or added bytes, the end missing."""
    found = bytearray(data)
    at = rng.randrange(len(found) + 1)
    match rng.randrange(5):
        case 0 if found:
            for _ in range(rng.choice((1, 1, 4, 32))):
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        case 1:
            del found[at:]
        case 2:
            del found[at : at + rng.choice((1, 8, 1000))]
        case 3:
            found[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
        case _:
            _overwrite(found, at, rng)
    return bytes(found)


def _overwrite(found: bytearray, at: int, rng: random.Random) -> None:
    """A number of 4 or 8 bytes at an edge, in place of what was there."""
    size = rng.choice((4, 8))
    number = rng.choice(EDGES) % (1 << 8 * size)
    found[at : at + size] = number.to_bytes(size, "little")


def _gguf(data: bytes, rng: random.Random) -> bytes:
    """Within the first bytes, where the header is, counts, lengths, types and offsets."""
    found = bytearray(data)
    reach = min(len(found), rng.choice((32, 256, 2000)))
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(reach) if reach else 0
        if rng.random() < 0.6:
            _overwrite(found, at, rng)
        elif found:
            found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
    return bytes(found)


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1:
        return (
            rng.choice((*EDGES[:-1], length + 1, length - 1, 10**8 + 1)).to_bytes(16, "little", signed=True)[:8]
            + data[8:]
        )
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    if rng.random() < 0.4:
        return data[: 8 + length] + _in_an_array(header, body, rng)
    text = _text(_in_header(header, len(body), rng))
    return len(text).to_bytes(8, "little") + text + body


def _in_an_array(header: dict[str, Any], body: bytes, rng: random.Random) -> bytes:
    arrays = [facts["data_offsets"] for name, facts in header.items() if name != "__metadata__"]
    start, stop = rng.choice(arrays)
    part = bytearray(body[start:stop])
    if part and rng.random() < 0.3:
        part[:] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF, 0x7E, ord("{")))]) * len(part)
    elif part:
        for _ in range(rng.choice((1, 8, 64))):
            part[rng.randrange(len(part))] = rng.randrange(256)
    return body[:start] + bytes(part) + body[stop:]


def _in_header(header: dict[str, Any], size: int, rng: random.Random) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    if not names or rng.random() < 0.3:
        return dict(_changed(header, rng))
    name = rng.choice(names)
    facts, other = header[name], header[rng.choice(names)]
    match rng.randrange(7):
        case 0:
            facts["dtype"] = rng.choice(DTYPES)
        case 1:
            facts["shape"] = _shape(facts["shape"], rng)
        case 2:
            facts["data_offsets"] = rng.choice(
                ([0, size], [size, size], [0, 0], list(other["data_offsets"]), [0, 2**63])
            )
        case 3:
            del header[name]
        case 4:
            header[TWICE + name] = facts
        case 5:
            header[_renamed(name, names, rng)] = header.pop(name)
        case _:  # another array of the same bytes: what a hostile file would do to be large when it is read
            facts["dtype"], facts["shape"] = "U8", [facts["data_offsets"][1] - facts["data_offsets"][0]]
    return header


def _shape(shape: list[int], rng: random.Random) -> list[int]:
    """Often as many numbers as before, so that the header stays sound."""
    match rng.randrange(6):
        case 0:
            return shape[::-1]
        case 1:
            return [*shape, 1]
        case 2 if len(shape) > 1:
            return [shape[0] * shape[1], *shape[2:]]
        case 3 if shape and shape[0] % 2 == 0:
            return [shape[0] // 2, 2, *shape[1:]]
        case 4:
            return [rng.choice((0, 2**31, 2**62)), *shape]
        case _:
            return [rng.choice(EDGES[:-1]) if rng.random() < 0.5 else n for n in shape]


def _renamed(name: str, names: list[str], rng: random.Random) -> str:
    module, _, local = name.rpartition(".")
    locals_ = [n.rpartition(".")[2] for n in names]
    return rng.choice(
        (
            f"{module}.{rng.choice(locals_)}",
            local,
            "",
            ".",
            "." + local,
            f"{name}.x",
            "é\u202e" + name,
            rng.choice(EVIL),
        )
    )


def _json(data: bytes, rng: random.Random) -> bytes:
    return _text(_changed(json.loads(data), rng))


def _changed(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value changed, deep ones as likely as shallow ones."""
    if isinstance(value, str) and value[:1] == "{" and rng.random() < 0.8:  # JSON in a string, as metadata hold it
        return json.dumps(_changed(json.loads(value), rng))
    inside = isinstance(value, dict | list) and bool(value) and rng.random() < 0.85
    if not inside:
        return _other(value, rng)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        change = rng.randrange(5)
        return (
            value[:at]
            + ([] if change == 0 else [_changed(value[at], rng)] * (2 if change == 1 else 1))
            + value[at + 1 :]
        )
    key = rng.choice(sorted(value))
    match rng.randrange(8):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            return {rng.choice((*EVIL, "", key + "x", key.upper())) if k == key else k: v for k, v in value.items()}
        case 2:
            return value | {rng.choice((*EVIL, TWICE + key)): value[key]}
        case _:
            return value | {key: _changed(value[key], rng)}


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int) and rng.random() < 0.6:
        return rng.choice((*EDGES, value + 1, value - 1, value * 2, value // 2, float(value), str(value)))
    if isinstance(value, str) and rng.random() < 0.4:
        return rng.choice((*EVIL, value.upper(), value + "x", value[:-1], (value * 1000)[:MOST]))
    return rng.choice((*ODD, *ODD, *EDGES, DEEP, [value] * 1000, {str(value): value}))


def _text(value: Any) -> bytes:
    text = json.dumps(value)
    text = text.replace(json.dumps(TWICE)[1:-1], "")
    return text.replace(json.dumps(DEEP), "[" * DEPTH + "]" * DEPTH).encode()
