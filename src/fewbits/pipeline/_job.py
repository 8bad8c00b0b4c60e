"""Everything that is decided before the first weight is read: what comes in, what goes out, each tensor's fate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoint import KINDS, Entry, Kind, Reader
from fewbits.checkpoint.activations import cache_scales, input_scale
from fewbits.engine import LayeredModel
from fewbits.errors import UnsupportedError
from fewbits.formats import ActivationFormat, Float, Format, activation_named
from fewbits.methods import METHODS, Recipe, TensorMethod, recipe_named
from fewbits.methods.rotate import Rotate
from fewbits.models import Architecture, Piece, Role, describe, gguf_dropped, gguf_extras, gguf_metadata
from fewbits.pipeline._blocks import Rounded
from fewbits.pipeline._gguf_source import GgufSource
from fewbits.pipeline._rotated import RotatedReader
from fewbits.pipeline._solved import Solved
from fewbits.pipeline._source import cut, dtype_of, local_folder, open_source, require_ties
from fewbits.pipeline._weighing import Weighing, require_weighable, weighing
from fewbits.plan.rules import Plan, Rules, parse
from fewbits.plan.rules import Tensor as PlanTensor
from fewbits.results import CalibrationReport, Trial

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
    rules: Rules
    plan: Plan
    entries: tuple[Entry, ...]
    metadata: Mapping[str, Any]
    extras: Mapping[str, tuple[float, ...]]  # tensors that no parameter of the source holds
    beside: Mapping[str, Mapping[str, Any]]  # JSON files of a folder that the source has in another form
    dropped: Mapping[str, str]  # parameters that the file has no need of: name -> reason
    recipe: Recipe
    method: TensorMethod  # of what is not solved block by block
    rounded: Rounded
    weighing: Weighing | None = None  # of what is not solved block by block
    scales: tuple[Entry, ...] = ()  # static scales, which the blocks are to find
    solved: Solved | None = None
    calibrated: CalibrationReport | None = None
    trials: tuple[Trial, ...] = ()
    finished_by: tuple[str, ...] = ()  # finishers that were added to the recipe
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else the ledger says: of a plan, of a training

    @property
    def method_name(self) -> str:
        """What was done, as `--method` takes it."""
        return "+".join((self.recipe.name, *self.finished_by))


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
    inputs: str | None,
    cache: str | None,
    imatrix: str | Path | None = None,
    planned: Mapping[str, Format] | None = None,
) -> Job:
    """Open the source and decide every tensor's fate; nothing is written. planned: tensor -> format, of a plan."""
    source, out = local_folder(model), Path(out)
    reader = original = open_source(source)
    wanted = parse(format)
    asked = None if inputs is None else activation_named(inputs)
    target = choose_kind(out, wanted, kind, asked)
    rounding = asked or target.inputs
    beside = original.companions() if isinstance(original, GgufSource) and target.name != "gguf" else {}
    architecture = describe(reader.config, {name: entry.shape for name, entry in reader.entries.items()})
    require_ties(reader, architecture.tied)
    recipe = recipe_named(method) if isinstance(method, str) else method
    if imatrix is not None:
        require_weighable(recipe)
    for transform in recipe.transforms:
        if isinstance(transform, Rotate):
            reader = RotatedReader(reader, transform)
            architecture = describe(reader.config, {name: entry.shape for name, entry in reader.entries.items()})
    metadata: Mapping[str, Any] = reader.config
    extras: Mapping[str, tuple[float, ...]] = {}
    dropped: Mapping[str, str] = {}
    if target.name == "gguf":
        metadata, extras = gguf_facts(original, reader.config, source, pretokenizer)
        dropped = gguf_dropped(reader.config, {name: entry.shape for name, entry in reader.entries.items()})
    pieces = tuple(cut(target, architecture, reader))
    names = {piece.name for piece in pieces}
    rules = Rules(
        format=wanted,
        admits=lambda name, shape, f: target.admits_beside(target.entry(name, shape, f), names),
        vocabulary=None if vocabulary is None else parse(vocabulary),
        overrides=tuple((p, None if f == "keep" else parse(f)) for p, f in (overrides or {}).items()),
        gguf=target.name == "gguf",
        fine_rows=target.fine_rows,
        planned=planned,
    )
    plan = rules.plan(planned_for(pieces, reader))
    weighed = None if imatrix is None else weighing(Path(imatrix), target, architecture, reader, pieces)
    plan = weighed.noted(plan) if weighed else plan
    streamed = recipe.solver if recipe.streams else METHODS["rtn"]
    assert isinstance(streamed, TensorMethod)
    tensors = tuple(_entry(piece, plan, target, rounding) for piece in pieces)
    if asked is not None and not any(entry.inputs for entry in tensors):
        raise UnsupportedError(_refused(tensors, target, asked))
    rounded = Rounded({e.name: e.inputs for e in tensors if e.inputs}, None if cache is None else cache_named(cache))
    scales = (*filter(None, map(input_scale, tensors)), *_cache_entries(reader, rounded))
    entries = (*tensors, *(Entry(name, (len(values),), FP32) for name, values in extras.items()), *scales)
    return Job(
        source=source,
        out=out,
        reader=reader,
        architecture=architecture,
        kind=target,
        pieces=pieces,
        rules=rules,
        plan=plan,
        entries=entries,
        metadata=metadata,
        extras=extras,
        beside=beside,
        dropped=dropped,
        recipe=recipe,
        method=streamed,
        rounded=rounded,
        weighing=weighed,
        scales=scales,
    )


def planned_for(pieces: Sequence[Piece], reader: Reader) -> list[PlanTensor]:
    """The tensors of the output, as rules see them."""
    return [PlanTensor(p.name, p.role.value, p.shape, dtype_of(reader, p.source)) for p in pieces]


def gguf_facts(
    reader: Reader, config: Mapping[str, Any], source: Path, pretokenizer: str | None
) -> tuple[Mapping[str, Any], Mapping[str, tuple[float, ...]]]:
    """A GGUF output's metadata and extra tensors: a GGUF source's own, else what the model's folder says."""
    if not isinstance(reader, GgufSource):
        return gguf_metadata(config, source, pre=pretokenizer), gguf_extras(config)
    if pretokenizer is not None:
        raise UnsupportedError(
            f"pre-tokenizer {pretokenizer} for {source}: its metadata, which says "
            f"{reader.metadata.get('tokenizer.ggml.pre')!r}, goes into the output as it is; leave --pretokenizer out"
        )
    return reader.metadata, reader.extras


def _entry(piece: Piece, plan: Plan, kind: Kind, rounding: ActivationFormat | None) -> Entry:
    """The entry of a piece; its inputs are rounded if they can be (those of experts cannot)."""
    entry = Entry(piece.name, piece.shape, plan[piece.name].format)
    layer = piece.role is Role.LINEAR or kind.inputs is not None
    if rounding is None or not layer or not plan[piece.name].quantized:
        return entry
    with_inputs = replace(entry, inputs=rounding)
    return with_inputs if kind.admits(with_inputs) is None else entry


def _refused(entries: tuple[Entry, ...], kind: Kind, rounding: ActivationFormat) -> str:
    """Why no layer's inputs can be rounded."""
    first = next(entry for entry in entries if len(entry.shape) == 2)
    quantized = next((entry for entry in entries if not isinstance(entry.format, Float)), first)
    return f"no layer's inputs can be rounded to {rounding}: {kind.admits(replace(quantized, inputs=rounding))}"


def _cache_entries(reader: Reader, rounded: Rounded) -> list[Entry]:
    """The scales of every attention's keys and values."""
    if rounded.cache is None:
        return []
    model = LayeredModel(reader)
    names = [name for index in range(len(model.layers)) for name in model.attentions(index)]
    if not names:
        raise UnsupportedError(f"{reader.path}: no attention of it keeps keys and values that could be rounded")
    return [entry for name in names for entry in cache_scales(name, rounded.cache)]


def cache_named(name: str) -> ActivationFormat:
    """The format of a key-value cache: int8 or fp8. Raises UnsupportedError for anything else."""
    if name not in ("int8", "fp8"):
        raise UnsupportedError(f"a key-value cache of '{name}': it can be int8 or fp8 (vLLM runs fp8 only)")
    return activation_named(f"{name}-static")


def choose_kind(out: Path, format: Format, kind: str | None, inputs: ActivationFormat | None = None) -> Kind:
    """The kind asked for, or GGUF by the output's name, or the first folder kind that can hold the format."""
    if kind is not None:
        if kind not in KINDS:
            raise UnsupportedError(f"file type '{kind}' is not known; choose one of {', '.join(KINDS)}")
        return KINDS[kind]
    if out.suffix == ".gguf":
        return KINDS["gguf"]
    probe = Entry("model.layers.0.mlp.up_proj.weight", (4096, 4096), format, inputs)
    fitting = [KINDS[name] for name in FOLDERS if KINDS[name].admits(probe) is None]
    return fitting[0] if fitting else KINDS["fewbits"]  # which says why it cannot
