"""What a plan can choose from: the formats that each tensor may have in a file, and the planner's table of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from fewbits.errors import UnsupportedError
from fewbits.formats import Float, Format, format_named
from fewbits.pipeline._job import Job, planned_for
from fewbits.pipeline._probe import role_of
from fewbits.pipeline._sensitivity import Costs
from fewbits.plan.presets import PRESETS, preset_formats, preset_named
from fewbits.plan.rules import Choice as TensorChoice
from fewbits.plan.solve import Choice
from fewbits.plan.table import Option, Table, Unit
from fewbits.plan.targets import Target


def options_of(job: Job, formats: Sequence[Format], target: Target) -> dict[str, list[TensorChoice]]:
    """Tensor -> what it can be: each candidate in which the file can hold it (or what takes its place), or kept."""
    tensors = planned_for(job.pieces, job.reader)
    found: dict[str, dict[str, TensorChoice]] = defaultdict(dict)
    for format in formats:
        rules = replace(job.rules, format=format, vocabulary=format if target.vocabulary else None)
        for name, choice in rules.plan(tensors).items():
            if choice.quantized:
                found[name][choice.format.name] = choice
    for tensor in tensors:
        if tensor.name in found:
            kept = Float(tensor.dtype)
            found[tensor.name][kept.name] = TensorChoice(kept)
    return {name: list(choices.values()) for name, choices in found.items()}


def table_of(
    job: Job, choices: Mapping[str, Sequence[TensorChoice]], costs: Costs, factors: Mapping[str, float], target: Target
) -> Table:
    """The table of all units. Raises UnsupportedError where tensors that must be alike have no format in common."""
    shapes = {piece.name: piece.shape for piece in job.pieces}
    members: dict[str, list[str]] = defaultdict(list)
    for name in choices:
        members[target.unit_of(name)].append(name)
    units = []
    for unit, names in members.items():
        formats = {c.format.name: c.format for c in choices[names[0]]}
        common = [f for f in formats if all(f in [c.format.name for c in choices[name]] for name in names)]
        if not common:
            raise UnsupportedError(f"{', '.join(names)} must be in one format, and there is none that holds them all")
        options = [
            Option(
                f,
                sum(job.kind.file_bytes(formats[f], shapes[name]) for name in names),
                sum(_cost(costs[name], formats[f]) * factors.get(role_of(name), 1.0) for name in names),
            )
            for f in common
        ]
        weights = sum(torch.Size(shapes[name]).numel() for name in names)
        units.append(Unit(unit, tuple(names), weights, tuple(options)))
    chosen_for = set(choices)
    rest = sum(job.kind.file_bytes(e.format, e.shape) for e in job.entries if e.name not in chosen_for)
    return Table(tuple(units), rest + job.kind.header_bytes(job.entries, job.metadata))


def _cost(costs: Mapping[str, float], format: Format) -> float:
    """Nats a token; nothing where the matrix stays in floating point."""
    return 0.0 if isinstance(format, Float) else costs[format.name]


def mixtures_of(job: Job, *, imatrix: bool) -> dict[str, Choice]:
    """Name of a preset -> tensor -> format; none for other files than GGUF and for models with experts."""
    if job.kind.name != "gguf":
        return {}
    tensors, found = planned_for(job.pieces, job.reader), dict[str, dict[str, str]]()
    for name in PRESETS:
        with suppress(UnsupportedError):
            formats = preset_formats(name, tensors, job.reader.config, imatrix=imatrix)
            found[name] = {tensor: format.name for tensor, format in formats.items()}
    return found


def mixture_named(mixtures: Mapping[str, Choice], preset: str) -> Choice:
    preset_named(preset)
    name = preset.upper()
    if name not in mixtures:
        raise UnsupportedError(f"preset {name}: presets are for GGUF files of models without experts; give a budget")
    return mixtures[name]


def add_options(choices: dict[str, list[TensorChoice]], mixture: Choice) -> None:
    """Let every tensor have the format that a preset gives it."""
    for tensor, format in mixture.items():
        if format not in [choice.format.name for choice in choices.get(tensor, [])]:
            choices.setdefault(tensor, []).append(TensorChoice(format_named(format)))


def within_table(table: Table, mixtures: Mapping[str, Choice]) -> dict[str, tuple[int, float]]:
    """Name -> bytes and divergence of the presets all of whose formats are in the table."""
    options = {unit.name: {option.format for option in unit.options} for unit in table.units}
    fitting = {
        name: mixture
        for name, mixture in mixtures.items()
        if mixture.keys() == options.keys() and all(f in options[unit] for unit, f in mixture.items())
    }
    return {name: (table.nbytes(mixture), table.divergence(mixture)) for name, mixture in fitting.items()}
