"""A finished plan: what was chosen, what else there was, and what it was measured on. Kept as a readable JSON file.

The file holds the whole table, so another budget can be planned from it without measuring again, and any tensor's
choice can be explained later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError, OutputError, UnsupportedError
from fewbits.formats import Format
from fewbits.plan.rules import parse
from fewbits.plan.solve import Choice, fewest_bytes, frontier, smallest_divergence
from fewbits.plan.table import Option, Table, Unit, undominated
from fewbits.results import FrontierPoint

POINTS = 14  # sizes at which the frontier is drawn


@dataclass(frozen=True)
class Budget:
    """What the user has, one of the fields. size: bytes of the file; bpw: bits a weight, over everything in it; memory:
    bytes of the process that runs the model on `context` tokens; max_kld: nats a token from the original; preset: no
    budget, but llama.cpp's mixture of that name.
    """

    size: float | None = None
    bpw: float | None = None
    memory: float | None = None
    max_kld: float | None = None
    preset: str | None = None
    context: int = 8192

    def __post_init__(self) -> None:
        given = {key: value for key, value in self.amounts.items() if value is not None}
        if len(given) != 1:
            raise UnsupportedError(
                f"a budget of {', '.join(given) or 'nothing'}: give one of memory, size, bpw, max_kld and preset"
            )
        ((key, value),) = given.items()
        if not isinstance(value, str) and not 0 < value < float("inf"):
            raise UnsupportedError(f"a budget of {key} {value:g}: it must be more than 0")

    @property
    def amounts(self) -> dict[str, float | str | None]:
        return {key: value for key, value in asdict(self).items() if key != "context"}


@dataclass(frozen=True)
class Planned:
    """A plan.

    formats: unit -> format. weights: of the whole model. overhead: bytes that the process which runs it needs beside
    the file, at the budget's context. measured_on: the text of the table's figures, None for rules of thumb.
    corrections: role -> measured over predicted divergence, by which the table's figures were multiplied. presets:
    name of a mixture of llama.cpp's -> bytes and expected divergence of the model in it, solved as the plan is. trial:
    measured over expected divergence of these formats, by which the whole table was multiplied; None without one.
    """

    model: str
    target: str
    method: str
    budget: Budget
    table: Table
    formats: Choice
    weights: int
    overhead: int
    measured_on: str | None
    corrections: Mapping[str, float]
    presets: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    trial: float | None = None

    @property
    def nbytes(self) -> int:
        """The file's size."""
        return self.table.nbytes(self.formats)

    @property
    def divergence(self) -> float:
        """Expected, nats a token."""
        return self.table.divergence(self.formats)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    @property
    def memory(self) -> int:
        """Bytes of the process that runs it."""
        return self.nbytes + self.overhead

    def tensors(self) -> dict[str, Format]:
        """Tensor -> format."""
        return {tensor: parse(self.formats[unit.name]) for unit in self.table.units for tensor in unit.tensors}

    def within(self, budget: Budget) -> Planned:
        """The same table within another budget. Raises UnsupportedError for a memory at another context's length."""
        if budget.memory is not None and budget.context != self.budget.context:
            raise UnsupportedError(
                f"a memory of {budget.memory:g} bytes at a context of {budget.context} tokens: the plan knows what the "
                f"process takes at {self.budget.context}; plan from the model with --context {budget.context}"
            )
        return replace(self, budget=budget, formats=chosen(self.table, budget, self.weights, self.overhead))

    def scaled(self, factor: float) -> Planned:
        """The same with all divergences times what a trial found."""
        units = tuple(
            replace(unit, options=tuple(replace(o, divergence=o.divergence * factor) for o in unit.options))
            for unit in self.table.units
        )
        presets = {name: (nbytes, divergence * factor) for name, (nbytes, divergence) in self.presets.items()}
        return replace(self, table=replace(self.table, units=units), presets=presets, trial=factor)

    def unit(self, name: str) -> Unit:
        """A unit by its name or a tensor's. Raises UnsupportedError for an unknown one."""
        for unit in self.table.units:
            if name == unit.name or name in unit.tensors:
                return unit
        first = self.table.units[0].name
        raise UnsupportedError(f"{name}: the plan chooses no format for it; it does for {first} and others")


def chosen(table: Table, budget: Budget, weights: int, overhead: int) -> Choice:
    """The best formats within a budget.

    Raises UnsupportedError where nothing is within it, or if it is a preset, which is no budget.
    """
    if budget.max_kld is not None:
        return fewest_bytes(table, budget.max_kld)
    if budget.memory is not None:
        return smallest_divergence(table, int(budget.memory) - overhead)
    if budget.size is not None:
        return smallest_divergence(table, int(budget.size))
    if budget.bpw is None:
        raise UnsupportedError(f"preset {budget.preset}: a preset is planned from the model, not from a plan's table")
    return smallest_divergence(table, int(budget.bpw * weights / 8))


@dataclass(frozen=True)
class Explanation:
    """Why a unit got its format. price: nats that a byte is worth in this plan, the most that any larger option of any
    unit saves for each byte more; dearer: that unit, None where all have their best. step: what this unit's next larger
    option saves for each byte more, None where there is none.
    """

    unit: Unit
    format: str
    next: Option | None
    step: float | None
    price: float
    dearer: str | None


def explained(plan: Planned, name: str) -> Explanation:
    """Why a tensor got its format. Raises UnsupportedError for one that no format was chosen for."""
    unit = plan.unit(name)
    found = {each.name: _next(each, plan.formats[each.name]) for each in plan.table.units}
    dearer = max((each for each, (_, rate) in found.items() if rate), key=lambda each: found[each][1], default=None)
    larger, rate = found[unit.name]
    price = found[dearer][1] if dearer else 0.0
    return Explanation(unit, plan.formats[unit.name], larger, rate if larger else None, price, dearer)


def _next(unit: Unit, format: str) -> tuple[Option | None, float]:
    """The larger option that saves most for each byte more, and how many nats."""
    now = unit.option(format)
    larger = [option for option in undominated(unit.options) if option.nbytes > now.nbytes]
    rates = [(now.divergence - option.divergence) / (option.nbytes - now.nbytes) for option in larger]
    return (larger[rates.index(max(rates))], max(rates)) if rates else (None, 0.0)


def expected(plan: Planned) -> tuple[FrontierPoint, ...]:
    """The plan, the best ones of other sizes, and presets, as the table expects them."""
    others = [choice for choice in frontier(plan.table, POINTS) if choice != plan.formats]
    best = [("", plan.table.nbytes(choice), plan.table.divergence(choice)) for choice in others]
    plans = [("this plan", plan.nbytes, plan.divergence), *best]
    return (
        *(FrontierPoint(name, n, d, "plan", measured=False) for name, n, d in plans if d > 0),
        *(FrontierPoint(name, n, d, "preset", measured=False) for name, (n, d) in plan.presets.items()),
    )


def in_brief(plan: Planned) -> dict[str, Any]:
    """What a ledger tells of a plan: JSON values, with what the table leads to instead of the table."""
    return {
        "budget": {key: value for key, value in asdict(plan.budget).items() if value is not None},
        "target": plan.target,
        "method": plan.method,
        "nbytes": plan.nbytes,
        "divergence": plan.divergence,
        "measured_on": plan.measured_on,
        "trial": plan.trial,
        "points": [asdict(point) for point in expected(plan)],
    }


def refuse_existing(path: Path) -> None:
    """Raise OutputError if there is such a file."""
    if path.exists():
        raise OutputError(f"{path}: exists already; choose another name or remove it")


def write_plan(plan: Planned, path: Path) -> None:
    """Whole or not at all. Raises OutputError where the file exists or cannot be written."""
    partial = path.with_name(f"{path.name}.partial")
    refuse_existing(path)
    try:
        partial.write_text(_document(plan), encoding="utf-8")
        partial.rename(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_plan(path: Path) -> Planned:
    """Raises CheckpointError if the file is no plan."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        plan = _plan(found)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is no plan of fewbits ({type(error).__name__}: {error}); make it anew"
        ) from error
    for unit in plan.table.units:
        if not all(o.nbytes > 0 and 0 <= o.divergence < math.inf for o in unit.options):
            raise CheckpointError(
                f"{path}: {unit.name} has an option of no bytes or no finite divergence; make it anew"
            )
        if plan.formats[unit.name] not in [option.format for option in unit.options]:
            raise CheckpointError(
                f"{path}: {unit.name} is planned as {plan.formats[unit.name]}, which is not among its options "
                f"{', '.join(option.format for option in unit.options)}; choose one of them"
            )
    return plan


def _document(plan: Planned) -> str:
    """JSON, a line for each unit."""
    head = {
        "plan": 1,
        "model": plan.model,
        "target": plan.target,
        "method": plan.method,
        "budget": {key: value for key, value in asdict(plan.budget).items() if value is not None},
        "bytes": plan.nbytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "divergence": plan.divergence,
        "weights": plan.weights,
        "fixed": plan.table.fixed,
        "overhead": plan.overhead,
        "measured_on": plan.measured_on,
        "corrections": dict(plan.corrections),
        "trial": plan.trial,
        "presets": {name: list(found) for name, found in plan.presets.items()},
    }
    units = [
        {
            "name": unit.name,
            "format": plan.formats[unit.name],
            "weights": unit.weights,
            "tensors": unit.tensors,
            "options": {option.format: [option.nbytes, option.divergence] for option in unit.options},
        }
        for unit in plan.table.units
    ]
    lines = ",\n  ".join(json.dumps(unit, ensure_ascii=False) for unit in units)
    return json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "units": [\n  {lines}\n ]\n}}\n'


def _plan(found: Any) -> Planned:
    units = tuple(
        Unit(
            str(unit["name"]),
            tuple(map(str, unit["tensors"])),
            int(unit["weights"]),
            tuple(Option(str(name), int(n), float(d)) for name, (n, d) in unit["options"].items()),
        )
        for unit in found["units"]
    )
    return Planned(
        model=str(found["model"]),
        target=str(found["target"]),
        method=str(found["method"]),
        budget=Budget(**found["budget"]),
        table=Table(units, int(found["fixed"])),
        formats={str(unit["name"]): str(unit["format"]) for unit in found["units"]},
        weights=int(found["weights"]),
        overhead=int(found["overhead"]),
        measured_on=found["measured_on"],
        corrections={str(role): float(factor) for role, factor in found["corrections"].items()},
        trial=None if found["trial"] is None else float(found["trial"]),
        presets={str(name): (int(n), float(d)) for name, (n, d) in found["presets"].items()},
    )
