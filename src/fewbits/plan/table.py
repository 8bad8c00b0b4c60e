"""What can be chosen and what each choice costs: the planner's table.

A unit is a tensor, or several that an engine wants in one format. Each of its options is a format, with the bytes that
the unit takes in the file and the rise in divergence from the original that is expected of it, in nats a token. Rises
of different units add up, to second order (`fewbits.stats.curvature`), which is what makes choosing a knapsack problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A format for a unit. nbytes: in the file; divergence: expected rise, nats a token."""

    format: str
    nbytes: int
    divergence: float


@dataclass(frozen=True)
class Unit:
    """Tensors that get one format, and the formats there are. weights: how many numbers they hold."""

    name: str
    tensors: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]

    def option(self, format: str) -> Option:
        return next(option for option in self.options if option.format == format)


@dataclass(frozen=True)
class Table:
    """All units, and what else is in the file. fixed: bytes of everything that is not chosen, headers included."""

    units: tuple[Unit, ...]
    fixed: int

    @property
    def weights(self) -> int:
        """Numbers that are chosen a format for."""
        return sum(unit.weights for unit in self.units)

    def nbytes(self, choice: Mapping[str, str]) -> int:
        """The file's size with these formats, unit -> format."""
        return self.fixed + sum(unit.option(choice[unit.name]).nbytes for unit in self.units)

    def divergence(self, choice: Mapping[str, str]) -> float:
        """The expected divergence with them, nats a token."""
        return sum(unit.option(choice[unit.name]).divergence for unit in self.units)

    @property
    def smallest(self) -> int:
        return self.fixed + sum(min(option.nbytes for option in unit.options) for unit in self.units)

    @property
    def finest(self) -> int:
        """The file's size with everything in the largest format that still costs something."""
        costly = ([o.nbytes for o in unit.options if o.divergence > 0] for unit in self.units)
        return self.fixed + sum(max(sizes, default=0) for sizes in costly)


def undominated(options: Sequence[Option]) -> list[Option]:
    """Those that no other one beats in both bytes and divergence, smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.divergence)):
        if not kept or option.divergence < kept[-1].divergence:
            kept.append(option)
    return kept
