"""Methods put together: `rotate+awq+gptq+tune` is two transforms, a solver and a finisher, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbits.errors import UnsupportedError
from fewbits.methods.base import Finisher, Method, Solver, TensorMethod, Transform


@dataclass(frozen=True)
class Recipe:
    """Transforms, then a solver, then finishers."""

    transforms: tuple[Transform, ...]
    solver: Solver
    finishers: tuple[Finisher, ...]

    @property
    def name(self) -> str:
        return "+".join(method.name for method in (*self.transforms, self.solver, *self.finishers))

    @property
    def calibrated(self) -> bool:
        """Whether the model has to run on calibration text."""
        return any(method.calibrated for method in (*self.transforms, self.solver, *self.finishers))

    @property
    def streams(self) -> bool:
        """Whether tensors can be quantized one by one, as they are read."""
        whole = [transform for transform in self.transforms if not transform.rewrites]
        return isinstance(self.solver, TensorMethod) and not (whole or self.finishers or self.calibrated)


def recipe(text: str, methods: Mapping[str, Method], default: Solver) -> Recipe:
    """The recipe that a name, or several joined by +, stands for. `default` is the solver where none is named.

    Raises UnsupportedError for an unknown name, two solvers, or an order that makes no sense.
    """
    named = [methods[part] for part in text.split("+")]
    transforms = tuple(m for m in named if isinstance(m, Transform))
    solvers = [m for m in named if isinstance(m, Solver)]
    finishers = tuple(m for m in named if isinstance(m, Finisher))
    if len(solvers) > 1:
        raise UnsupportedError(f"method '{text}': {' and '.join(s.name for s in solvers)} both choose codes; take one")
    if len(set(named)) < len(named) or named != [*transforms, *solvers, *finishers]:
        raise UnsupportedError(
            f"method '{text}': the order is transforms, one solver, finishers, each once, such as rotate+gptq+tune"
        )
    return Recipe(transforms, solvers[0] if solvers else default, finishers)
