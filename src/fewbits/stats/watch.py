"""Looking on while linear layers work.

A `Watcher` sees every `torch.nn.functional.linear` whose weight is one of its parameters. That is one mechanism for
everything a model may call a linear layer: `nn.Linear`, a router, and the experts of a mixture, which transformers
keeps in one 3-D parameter and multiplies by slices of it; what is seen of an expert are the tokens that were routed to
it, and no others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Site(NamedTuple):
    """A weight that reads something: a parameter's name, and the expert's index in a fused one."""

    parameter: str
    expert: int | None = None


class AllSeen(Exception):  # noqa: N818  # no error: it only ends a run
    """Ends a run of the model once everything that is watched has been seen."""


class Watcher(TorchFunctionMode):
    """Within it, what linear layers with these weights (name -> tensor, 2-D or fused 3-D) do is shown to `see`.

    stop: raise AllSeen once each of them has been seen. Fused ones are not done before the run is, because any number
    of experts may follow. outputs: whether `see` needs what they return; if not, it is not told, and a run may end
    before the last product.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, stop: bool = False, outputs: bool = True) -> None:
        super().__init__()
        self._outputs = outputs
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._stops = stop and all(parameter.dim() == 2 for parameter in parameters.values())
        self._left = set[str]()

    def __enter__(self) -> Self:
        self._left = set(self._names.values())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def see(self, site: Site, x: Tensor, y: Tensor | None) -> None:
        """What the layer at a site read, x [..., K], and returned, y [..., N]."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.linear:
            return func(*args, **kwargs)
        x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        site = _site(self._names, weight)
        if site is None:
            return func(*args, **kwargs)
        y = func(*args, **kwargs) if self._outputs else None
        self.see(site, x, y)
        self._left.discard(site.parameter)
        if self._stops and not self._left:
            raise AllSeen
        return func(*args, **kwargs) if y is None else y


class Recorder(Watcher):
    """Within it, what 2-D `parameters` return is kept."""

    def __init__(self, parameters: Mapping[str, Tensor], *, stop: bool = False) -> None:
        matrices = {name: parameter for name, parameter in parameters.items() if parameter.dim() == 2}
        super().__init__(matrices, stop=stop and bool(matrices))
        self._seen: dict[Site, tuple[Tensor, int]] = {}

    @property
    def outputs(self) -> dict[Site, Tensor]:
        """[..., N] by site, but for those that the model has overwritten since."""
        return {site: y for site, (y, version) in self._seen.items() if y._version == version}

    def see(self, site: Site, x: Tensor, y: Tensor | None) -> None:
        assert y is not None
        self._seen[site] = (y.detach(), y._version)


class OrderOfUse(Watcher):
    """Within it, one run of the model tells which `parameters` are used one after the other, and which together."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(parameters, outputs=False)
        self._steps: list[tuple[Tensor, dict[str, None]]] = []

    @property
    def steps(self) -> list[tuple[str, ...]]:
        """Names in order of first use; one step are those that read the same tensor, or are of different experts."""
        return [tuple(names) for _, names in self._steps]

    def see(self, site: Site, x: Tensor, y: Tensor | None) -> None:
        alike = _unnumbered(site.parameter)
        for read, names in self._steps:
            if read is x or any(_unnumbered(name) == alike for name in names):
                names.setdefault(site.parameter)
                return
        self._steps.append((x, {site.parameter: None}))


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _site(names: Mapping[int, str], weight: Tensor) -> Site | None:
    """Which of some parameters (by identity) a weight is, or is a slice of; None if it is none of them."""
    if id(weight) in names:
        return Site(names[id(weight)])
    base = weight._base
    if base is None or id(base) not in names or base.dim() != 3:
        return None
    return Site(names[id(base)], weight.storage_offset() // base.stride(0))
