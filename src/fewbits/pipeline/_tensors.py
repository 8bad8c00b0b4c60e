"""Every tensor of a checkpoint with what its ledger says of it, and what its bytes are spent on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fewbits.checkpoint import Kind, Reader
from fewbits.findings import Absent, Part, TensorFacts
from fewbits.formats import Float
from fewbits.formats.explain import code_bits
from fewbits.pipeline._told import finite

NUMBERED = "*"  # stands for an expert's number


def tensor_facts(kind: Kind, reader: Reader, lines: Mapping[str, Any]) -> tuple[TensorFacts, ...]:
    """Headers alone are read. lines: of the ledger, by tensor; empty without one."""
    found = []
    for entry in reader.entries.values():
        line = lines.get(entry.name, {})
        layer, part = place(entry.name)
        error = line.get("error")
        found.append(
            TensorFacts(
                name=entry.name,
                layer=layer,
                part=part,
                shape=entry.shape,
                weights=entry.weights,
                format=entry.format.name,
                floating=isinstance(entry.format, Float),
                nbytes=kind.file_bytes(entry.format, entry.shape),
                error=None if error is None else finite(error),
                digest=_first(line.get("digests")),
                **{key: words(line.get(key)) for key in ("fate", "method", "reason", "source")},
            )
        )
    return tuple(found)


def _first(digests: Any) -> str | None:
    return words(next(iter(digests.values()), None)) if isinstance(digests, dict) else None


def words(value: Any) -> str | None:
    """A text of a file that may be anybody's; None for anything else."""
    return value if isinstance(value, str) and value else None


def absent(lines: Mapping[str, Any]) -> Iterator[Absent]:
    """Parameters of the source that are in no tensor."""
    for name, line in lines.items():
        if line.get("fate") in ("tied", "dropped"):
            yield Absent(name, line["fate"], str(line.get("reason", "")))


def place(name: str) -> tuple[int | None, str]:
    """(layer, name inside it) of a tensor: the layer is the first number in its name, further ones are experts'."""
    parts = name.removesuffix(".weight").split(".")
    first = next((i for i, word in enumerate(parts) if word.isdigit()), None)
    if first is None:
        return None, ".".join(parts)
    inside = [NUMBERED if word.isdigit() else word for word in parts[first + 1 :]]
    return int(parts[first]), ".".join(inside) or parts[first]


def weight_parts(tensors: Sequence[TensorFacts], reader: Reader) -> tuple[Part, ...]:
    """The file's bytes by what they hold; the largest part first."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        format = reader.entries[tensor.name].format
        if isinstance(format, Float):
            found[f"kept in {format.name.upper()}"] += tensor.nbytes
            continue
        codes = min(tensor.nbytes, round(code_bits(format) * tensor.weights / 8))
        found["codes"] += codes
        found["scales and zero-points"] += tensor.nbytes - codes
    return tuple(Part(name, nbytes) for name, nbytes in found.most_common() if nbytes)
