"""From a model and a budget to a plan: measure what each format of each matrix costs, correct it by probes, choose."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from fewbits.engine import fast_float32
from fewbits.errors import UnsupportedError
from fewbits.formats import Float, Format, QTensor, format_named
from fewbits.methods import METHODS, TensorMethod
from fewbits.models import Role, cache_shape
from fewbits.pipeline._blocks import SolvedBlock, Work
from fewbits.pipeline._calibrate import Calibration, make_work, read_text
from fewbits.pipeline._job import Job, planned_for, prepare
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._probe import PROBE, Probes, corrections, role_of
from fewbits.pipeline._sensitivity import Costs, Trying, measure_costs
from fewbits.pipeline._thumb import costs_by_thumb
from fewbits.plan.planned import Budget, Planned, chosen
from fewbits.plan.presets import PRESETS, preset_formats, preset_named
from fewbits.plan.rules import Choice as TensorChoice
from fewbits.plan.solve import Choice
from fewbits.plan.table import Option, Table, Unit
from fewbits.plan.targets import Model, Target, target_named

Progress = Callable[[int, int, str], None]
PROBED_BITS = 3.0
"""Bits of the format that probes are made in: coarse enough to be seen, fine enough that errors add up."""


def plan(
    model: str | Path,
    budget: Budget,
    *,
    target: str = "gguf",
    method: str = "gptq",
    calibration: str | Path | Calibration | None = "self",
    candidates: Sequence[str] | None = None,
    probe: bool = True,
    progress: Progress | None = None,
) -> Planned:
    """Which format each tensor should have, for the least divergence within a budget.

    model: a Hugging Face folder, or a hub name. target: the engine that is to run it (`plan.targets`). method: that the
    plan will be quantized with. calibration: text that costs are measured on, a file or `self` (written by the model);
    None measures nothing and goes by rules of thumb. candidates: formats, by default the target's. probe: whether
    predictions are corrected by true divergences. Raises a FewbitsError, UnsupportedError if nothing fits the budget.
    """
    engine = target_named(target)
    formats = [format_named(name) for name in candidates or engine.candidates]
    out = Path("plan.gguf" if engine.kind == "gguf" else "plan")
    job = prepare(
        model,
        out,
        format=formats[0],
        method=method,
        kind=engine.kind,
        vocabulary=formats[0] if engine.vocabulary else None,
        overrides=None,
        pretokenizer=None,
        inputs=None,
        cache=None,
    )
    choices = options_of(job, formats, engine)
    mixtures = mixtures_of(job, imatrix=calibration is not None)
    if budget.preset is not None:
        _add_options(choices, _mixture(mixtures, budget.preset))
    given = calibration if isinstance(calibration, Calibration) or calibration is None else Calibration(calibration)
    if given is None:
        costs, factors, text = costs_by_thumb(job, choices), dict[str, float](), None
    else:
        with fast_float32(given.device):
            costs, factors, text = _measured(job, choices, given, probe, progress)
    table = table_of(job, choices, costs, factors, engine)
    weights = sum(entry.weights for entry in job.entries)
    overhead = engine.process(_shape(job, budget.context))
    return Planned(
        model=job.source.name,
        target=engine.name,
        method=method,
        budget=budget,
        table=table,
        formats=_mixture(mixtures, budget.preset) if budget.preset else chosen(table, budget, weights, overhead),
        weights=weights,
        overhead=overhead,
        measured_on=text,
        corrections=factors,
        presets=_within_table(table, mixtures),
    )


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


def _mixture(mixtures: Mapping[str, Choice], preset: str) -> Choice:
    preset_named(preset)
    name = preset.upper()
    if name not in mixtures:
        raise UnsupportedError(f"preset {name}: presets are for GGUF files of models without experts; give a budget")
    return mixtures[name]


def _add_options(choices: dict[str, list[TensorChoice]], mixture: Choice) -> None:
    """Let every tensor have the format that a preset gives it."""
    for tensor, format in mixture.items():
        if format not in [choice.format.name for choice in choices.get(tensor, [])]:
            choices.setdefault(tensor, []).append(TensorChoice(format_named(format)))


def _within_table(table: Table, mixtures: Mapping[str, Choice]) -> dict[str, tuple[int, float]]:
    """Name -> bytes and divergence of the presets all of whose formats are in the table."""
    options = {unit.name: {option.format for option in unit.options} for unit in table.units}
    fitting = {
        name: mixture
        for name, mixture in mixtures.items()
        if mixture.keys() == options.keys() and all(f in options[unit] for unit, f in mixture.items())
    }
    return {name: (table.nbytes(mixture), table.divergence(mixture)) for name, mixture in fitting.items()}


def _shape(job: Job, context: int) -> Model:
    """What the memory of an engine depends on."""
    config = job.reader.config
    text = {**config, **(config.get("text_config") or {})}
    hidden = int(text.get("hidden_size", 0))
    rows = {p.name: p.shape[-2] for p in job.pieces if p.role in (Role.LINEAR, Role.EXPERTS) and len(p.shape) > 1}
    first = {role_of(name): rows[name] for name in reversed(rows)}
    widest = sum(n for role, n in first.items() if role in ("ffn_gate", "ffn_up", "gate_proj", "up_proj"))
    projected = sum(n for role, n in first.items() if role[-1:] in "qkv" or role[:6] in ("q_proj", "k_proj", "v_proj"))
    vocabulary = max((p.shape[0] for p in job.pieces if p.role in (Role.EMBEDDING, Role.OUTPUT)), default=0)
    cached = cache_shape(config).numbers(context)
    return Model(hidden, widest or 8 * hidden, projected, vocabulary, context, cached)


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
                sum(costs[name].get(f, 0.0) * factors.get(role_of(name), 1.0) for name in names),
            )
            for f in common
        ]
        weights = sum(torch.Size(shapes[name]).numel() for name in names)
        units.append(Unit(unit, tuple(names), weights, tuple(options)))
    chosen_for = set(choices)
    rest = sum(job.kind.file_bytes(e.format, e.shape) for e in job.entries if e.name not in chosen_for)
    return Table(tuple(units), rest + job.kind.header_bytes(job.entries, job.metadata))


def _measured(
    job: Job,
    choices: Mapping[str, Sequence[TensorChoice]],
    calibration: Calibration,
    probe: bool,
    progress: Progress | None,
) -> tuple[Costs, dict[str, float], str]:
    """(costs, corrections by role, the text's name)."""
    work, _ = make_work(job, calibration)
    windows, held = read_text(job.reader, calibration)
    candidates = {name: [c.format for c in found if c.quantized] for name, found in choices.items()}
    probes = {name: _nearest(formats, PROBED_BITS) for name, formats in candidates.items()}
    missing = candidates.keys() - work.slots.keys() - work.vocabulary.keys()
    if missing:
        raise UnsupportedError(f"{min(missing)}: lies neither in a block nor in the vocabulary; keep it (--override)")
    trying = Trying(solver_of(job), candidates, probes)
    with tempfile.TemporaryDirectory(prefix="fewbits-plan-") as folder, Journal(Path(folder), {}, probes) as journal:

        def keep(index: int, matrices: Mapping[str, QTensor]) -> None:
            if probe and held is not None:
                journal.save(PROBE, index, SolvedBlock(matrices, {}, dict.fromkeys(matrices, 0.0), {}))

        costs = measure_costs(
            work, windows.ids, trying, keep, folder=Path(folder), limit=calibration.memory, progress=progress
        )
        factors = {}
        if probe and held is not None:
            factors = _factors(work, Probes(work, journal, held.ids).divergences(), costs, probes)
    return costs, factors, windows.description


def _factors(work: Work, measured: Mapping[str, float], costs: Costs, probes: Mapping[str, Format]) -> dict[str, float]:
    predicted: dict[str, float] = defaultdict(float)
    for name, format in probes.items():
        predicted[role_of(name)] += costs[name][format.name]
    return corrections(measured, predicted, sorted(predicted))


def solver_of(job: Job) -> TensorMethod:
    """What tries formats: the recipe's solver where it looks at single matrices, gptq-fast else."""
    solver = job.recipe.solver if isinstance(job.recipe.solver, TensorMethod) else METHODS["gptq-fast"]
    assert isinstance(solver, TensorMethod)
    return solver


def _nearest(formats: Sequence[Format], bits: float) -> Format:
    return min(formats, key=lambda format: abs(8 * format.nbytes((1, 256)) / 256 - bits))
