"""Everything that is decided before the first weight is read: what comes in, what goes out, each tensor's fate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoint import KINDS, Entry, Kind, Reader
from fewbits.errors import UnsupportedError
from fewbits.formats import Float, Format
from fewbits.methods import METHODS, Recipe, TensorMethod, recipe_named
from fewbits.models import Architecture, Piece, describe, gguf_dropped, gguf_extras, gguf_metadata
from fewbits.pipeline._solved import Solved
from fewbits.pipeline._source import cut, dtype_of, local_folder, open_source, require_ties
from fewbits.plan.rules import Plan, Rules, parse
from fewbits.plan.rules import Tensor as PlanTensor
from fewbits.results import CalibrationReport

FP32 = Float(torch.float32)
FOLDERS = ("huggingface", "compressed-tensors", "fewbits")  # most widely loaded first


@dataclass(frozen=True)
class Job:
    """Everything decided before the first weight is read."""

    source: Path
    out: Path
    reader: Reader
    architecture: Architecture
    kind: Kind
    pieces: tuple[Piece, ...]
    plan: Plan
    entries: tuple[Entry, ...]
    metadata: Mapping[str, Any]
    extras: Mapping[str, tuple[float, ...]]  # tensors that no parameter of the source holds
    dropped: Mapping[str, str]  # parameters that the file has no need of: name -> reason
    recipe: Recipe
    method: TensorMethod  # of what is not solved block by block
    solved: Solved | None = None
    calibrated: CalibrationReport | None = None


def prepare(
    model: str | Path,
    out: str | Path,
    *,
    format: str | Format,
    method: str | Recipe,
    kind: str | None,
    vocabulary: str | Format | None,
    overrides: Mapping[str, str | Format] | None,
    pretokenizer: str | None,
) -> Job:
    """Open the source and decide every tensor's fate; nothing is written."""
    source, out = local_folder(model), Path(out)
    reader = open_source(source)
    wanted = parse(format)
    target = choose_kind(out, wanted, kind)
    architecture = describe(reader.config, {name: entry.shape for name, entry in reader.entries.items()})
    require_ties(reader, architecture.tied)
    pieces = tuple(cut(target, architecture, reader))
    rules = Rules(
        format=wanted,
        admits=lambda name, shape, f: target.admits(Entry(name, shape, f)),
        vocabulary=None if vocabulary is None else parse(vocabulary),
        overrides=tuple((p, None if f == "keep" else parse(f)) for p, f in (overrides or {}).items()),
        gguf=target.name == "gguf",
    )
    plan = rules.plan([PlanTensor(p.name, p.role.value, p.shape, dtype_of(reader, p.source)) for p in pieces])
    metadata, extras, dropped = reader.config, dict[str, tuple[float, ...]](), dict[str, str]()
    if target.name == "gguf":
        metadata, extras = gguf_metadata(reader.config, source, pre=pretokenizer), gguf_extras(reader.config)
        dropped = gguf_dropped(reader.config, {name: entry.shape for name, entry in reader.entries.items()})
    recipe = recipe_named(method) if isinstance(method, str) else method
    streamed = recipe.solver if recipe.streams else METHODS["rtn"]
    assert isinstance(streamed, TensorMethod)
    entries = (
        *(Entry(piece.name, piece.shape, plan[piece.name].format) for piece in pieces),
        *(Entry(name, (len(values),), FP32) for name, values in extras.items()),
    )
    return Job(
        source, out, reader, architecture, target, pieces, plan, entries, metadata, extras, dropped, recipe, streamed
    )


def choose_kind(out: Path, format: Format, kind: str | None) -> Kind:
    """The kind asked for, or GGUF by the output's name, or the first folder kind that can hold the format."""
    if kind is not None:
        if kind not in KINDS:
            raise UnsupportedError(f"file type '{kind}' is not known; choose one of {', '.join(KINDS)}")
        return KINDS[kind]
    if out.suffix == ".gguf":
        return KINDS["gguf"]
    probe = Entry("model.layers.0.mlp.up_proj.weight", (4096, 4096), format)
    return next(KINDS[name] for name in FOLDERS if KINDS[name].admits(probe) is None)
