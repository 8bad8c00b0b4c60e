"""From a model and a budget to a plan: measure what each format of each matrix costs, correct it by probes, choose.

Two kinds of true divergence correct what curvature predicts. Probes (`_probe`) try the matrices of each role alone. A
trial runs the whole method with the formats that were chosen, as `quantize` will: matrices that are solved behind
others make up for a part of their errors, which no single matrix shows (a fifth or so with gptq). Its ratio to the
expected divergence scales the whole table.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from fewbits.engine import fast_float32
from fewbits.errors import UnsupportedError
from fewbits.formats import Format, QTensor, format_named
from fewbits.methods import METHODS, TensorMethod
from fewbits.models import Role, cache_shape
from fewbits.pipeline._blocks import SolvedBlock, Work
from fewbits.pipeline._calibrate import Calibration, make_ready, make_work, read_text, solving, text_of
from fewbits.pipeline._job import Job, prepare
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._options import add_options, mixture_named, mixtures_of, options_of, table_of, within_table
from fewbits.pipeline._probe import PROBE, Probes, corrections, role_of
from fewbits.pipeline._sensitivity import Costs, Trying, measure_costs
from fewbits.pipeline._thumb import costs_by_thumb
from fewbits.plan.planned import Budget, Planned, chosen
from fewbits.plan.rules import Choice
from fewbits.plan.targets import Model, target_named

Progress = Callable[[int, int, str], None]
PROBED_BITS = 3.0
"""Bits of the format that probes are made in: coarse enough to be seen, fine enough that errors add up."""

WIDENING = ("ffn_gate", "ffn_up", "gate_proj", "up_proj")
PROJECTING = ("attn_q", "attn_k", "attn_v", "q_proj", "k_proj", "v_proj")


def make_plan(
    model: str | Path,
    budget: Budget,
    *,
    target: str = "gguf",
    method: str = "gptq",
    calibration: str | Path | Calibration | None = "self",
    candidates: Sequence[str] | None = None,
    probe: bool = True,
    trial: bool = True,
    progress: Progress | None = None,
) -> Planned:
    """Which format each tensor should have, for the least divergence within a budget.

    model: a Hugging Face folder or GGUF file, or a hub name. target: the engine that is to run it (`plan.targets`).
    method: that the plan will be quantized with. calibration: text that costs are measured on, a file or `self`
    (written by the model); None measures nothing and goes by rules of thumb. candidates: formats, by default the
    target's. probe: whether the table is corrected by true divergences of the matrices of each role; trial: and by
    that of the chosen formats, all quantized, which takes about as long as `quantize` will.
    Raises a FewbitsError, UnsupportedError if nothing fits the budget.
    """
    engine = target_named(target)
    formats = [format_named(name) for name in candidates or engine.candidates]
    make = partial(
        prepare,
        model,
        Path("plan.gguf" if engine.kind == "gguf" else "plan"),
        format=formats[0],
        method=method,
        kind=engine.kind,
        vocabulary=formats[0] if engine.vocabulary else None,
        overrides=None,
        pretokenizer=None,
        inputs=None,
        cache=None,
    )
    job = make()
    choices, mixtures = options_of(job, formats, engine), mixtures_of(job, imatrix=calibration is not None)
    mixture = None if budget.preset is None else mixture_named(mixtures, budget.preset)
    if mixture is not None:
        add_options(choices, mixture)
    given = calibration if isinstance(calibration, Calibration) or calibration is None else Calibration(calibration)
    if given is None:
        costs, factors = costs_by_thumb(job, choices), dict[str, float]()
    else:
        given = replace(given, text=text_of(job.reader, given), limit=float("inf"))
        with fast_float32(given.device):
            costs, factors = _measured(job, choices, given, probe, _half(progress, 0) if trial else progress)
    table = table_of(job, choices, costs, factors, engine)
    weights, overhead = sum(e.weights for e in job.entries), engine.process(_shape(job, budget.context))
    made = Planned(
        model=job.source.name,
        target=engine.name,
        method=method,
        budget=budget,
        table=table,
        formats=mixture or chosen(table, budget, weights, overhead),
        weights=weights,
        overhead=overhead,
        measured_on=None if given is None else text_of(job.reader, given).description,
        corrections=factors,
        presets=within_table(table, mixtures),
    )
    return made if given is None or not trial else _tried(make, made, given, _half(progress, 1))


def _tried(make: Callable[..., Job], made: Planned, calibration: Calibration, progress: Progress | None) -> Planned:
    """The plan with its table scaled to what a trial of its formats measures; chosen anew where that matters."""
    job = make(planned=made.tensors())
    if not job.recipe.calibrated or not any(choice.quantized for choice in job.plan.values()):
        return made
    with (
        tempfile.TemporaryDirectory(prefix="fewbits-plan-") as folder,
        fast_float32(calibration.device),
        solving(job, make_ready(job, calibration), progress, Path(folder) / "trial") as run,
    ):
        found = run
        for finisher in job.recipe.finishers:
            found = found.finish(finisher)
    if not found.divergence or not made.divergence:
        return made
    scaled = made.scaled(found.divergence / made.divergence)
    return scaled if made.budget.max_kld is None else scaled.within(made.budget)


def _half(progress: Progress | None, which: int) -> Progress | None:
    """What the first or second half of the work reports to."""
    if progress is None:
        return None
    return lambda done, total, label: progress(done + which * total, 2 * total, label)


def _shape(job: Job, context: int) -> Model:
    """What the memory of an engine depends on."""
    config = job.reader.config
    text = {**config, **(config.get("text_config") or {})}
    hidden = int(text.get("hidden_size", 0))
    rows = {p.name: p.shape[-2] for p in job.pieces if p.role in (Role.LINEAR, Role.EXPERTS) and len(p.shape) > 1}
    first = {role_of(name): rows[name] for name in reversed(rows)}
    widest = sum(first.get(role, 0) for role in WIDENING)
    projected = sum(first.get(role, 0) for role in PROJECTING)
    vocabulary = max((p.shape[0] for p in job.pieces if p.role in (Role.EMBEDDING, Role.OUTPUT)), default=0)
    cached = cache_shape(config).numbers(context)
    return Model(hidden, widest or 8 * hidden, projected, vocabulary, context, cached)


def _measured(
    job: Job,
    choices: Mapping[str, Sequence[Choice]],
    calibration: Calibration,
    probe: bool,
    progress: Progress | None,
) -> tuple[Costs, dict[str, float]]:
    """(costs, corrections by role)."""
    work, _ = make_work(job, calibration)
    windows, held = read_text(job.reader, calibration)
    candidates = {name: [c.format for c in found if c.quantized] for name, found in choices.items()}
    probes = {name: _nearest(formats, PROBED_BITS) for name, formats in candidates.items()}
    missing = candidates.keys() - work.slots.keys() - work.vocabulary.keys()
    if missing:
        raise UnsupportedError(
            f"{min(missing)}: lies neither in a block nor in the vocabulary, so its cost cannot be measured"
        )
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
    return costs, factors


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
