"""Statistics of what linear layers read, gathered while the model runs.

Matrices that read the same tensor (queries, keys and values; gate and up) share one accumulator: whoever compares their
statistics with `is` can see it. Only `drift` and `scatter` belong to each matrix.

    importance   mean of x²       [K]      weight of a column's squared error
    magnitude    mean of |x|      [K]      what AWQ and SmoothQuant scale by
    absmax       largest |x|      [K]
    hessian      mean of x·xᵀ     [K, K]   half the second derivative of the squared error of a layer's output
    samples      some of the x    [S, K]   spread evenly over all tokens
    drift        mean (y' − y)·xᵀ [N, K]   y = W·x; y' what the original model's matrix makes of the same token
    scatter      mean (y' − y)²   [N]      measured with it
    tokens       how many         [1]      beside each Hessian

Means are over tokens and accumulated in float32 from sums of one batch each. The Hessian is that of the numbers that
are multiplied: under autocast to BF16, of x rounded to BF16, as the layer itself reads it.

Where activations are to be quantized with static scales, an observer (`fewbits.stats.observers`) sees each input too;
matrices that read the same tensor share it, and so they get the same scale, which engines that fuse them rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.kernels.gram import add_gram, mirror
from fewbits.stats.observers import Observer
from fewbits.stats.watch import Site, Watcher

OF_INPUTS = ("importance", "magnitude", "absmax", "hessian", "samples")
STATISTICS = (*OF_INPUTS, "drift")
SAMPLES = 512
"""Rows kept of each input where `samples` are asked for."""


@dataclass
class InputStatistics:
    """What was seen at one site, or at several that read the same tensor."""

    wanted: frozenset[str]
    every: int = 1  # of the rows, which go into `samples`
    observer: Observer | None = None
    tokens: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)
    _cached: dict[str, Tensor] = field(default_factory=dict)

    def add(self, x: Tensor) -> None:
        """Count rows x [T, K]."""
        x = x.detach()
        if "hessian" in self.wanted:
            if "hessian" not in self._sums:
                self._sums["hessian"] = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32)
            add_gram(self._sums["hessian"], _as_multiplied(x))
        if "samples" in self.wanted:
            self._kept.append(x[-self.tokens % self.every :: self.every].float())
        for name in ("importance", "magnitude", "absmax"):
            if name in self.wanted:
                self._accumulate(name, x.float())
        if self.observer is not None:
            self.observer.add(x.float())
        self.tokens += len(x)

    def value(self, name: str) -> Tensor:
        """The statistic of everything counted so far; the same tensor at every call, so consumers can share it."""
        if name not in self._cached:
            self._cached[name] = self._value(name)
        return self._cached[name]

    def values(self) -> dict[str, Tensor]:
        seen = self._sums.keys() | ({"samples"} if self._kept else set())
        found = {name: self.value(name) for name in OF_INPUTS if name in seen}
        return found | ({"tokens": self.value("tokens")} if "hessian" in seen else {})

    @property
    def nbytes(self) -> int:
        """What it holds."""
        return sum(tensor.nbytes for tensor in (*self._sums.values(), *self._kept))

    def _value(self, name: str) -> Tensor:
        if name == "samples":
            return torch.cat(self._kept)
        if name == "tokens":
            return torch.tensor([float(self.tokens)])
        total = self._sums[name]
        if name == "hessian":
            mirror(total)
        return total if name == "absmax" else total.div_(max(1, self.tokens))

    def _accumulate(self, name: str, x: Tensor) -> None:
        if name == "absmax":
            peak = x.abs().amax(0)
            self._sums[name] = torch.maximum(self._sums[name], peak) if name in self._sums else peak
            return
        terms = x.square() if name == "importance" else x.abs()
        self._sums[name] = self._sums.get(name, 0) + terms.sum(0)


def _as_multiplied(x: Tensor) -> Tensor:
    """x in the type that matrices are multiplied in where this is called."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Collector(Watcher):
    """Within it, the inputs of `parameters` (name -> tensor, 2-D or fused 3-D) are counted.

    tokens: about how many rows will pass in all, so that samples are spread over them. observer: makes what watches
    one input, for static scales of activations. `originals` holds what the original model's matrices returned in the
    batch that is about to run, by site, where `drift` is wanted; experts have none, because the same tokens may be
    routed elsewhere in the two models.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        wanted: Iterable[str],
        *,
        tokens: int,
        observer: Callable[[], Observer] | None = None,
        stop: bool = False,
    ) -> None:
        self._wanted = frozenset(wanted)
        super().__init__(parameters, stop=stop, outputs="drift" in self._wanted)
        unknown = self._wanted - set(STATISTICS)
        if unknown:
            raise ValueError(f"statistics {sorted(unknown)} are not known; there are {', '.join(STATISTICS)}")
        self._every = max(1, tokens // SAMPLES)
        self._observer = observer
        self.originals: Mapping[Site, Tensor] = {}
        self._sites: dict[Site, InputStatistics] = {}
        self._drifts: dict[Site, tuple[Tensor, Tensor]] = {}
        self._last: tuple[Tensor, InputStatistics] | None = None

    def statistics(self) -> dict[Site, InputStatistics]:
        """What was seen, by site; an expert that no token came to has no entry."""
        self._last = None
        return self._sites

    def drifts(self) -> dict[Site, dict[str, Tensor]]:
        """`drift` and `scatter` of each site that `originals` were given for."""
        found = {}
        for site, (drift, scatter) in self._drifts.items():
            tokens = max(1, self._sites[site].tokens)
            found[site] = {"drift": drift.div_(tokens), "scatter": scatter.div_(tokens)}
        self._drifts = {}
        return found

    def see(self, site: Site, x: Tensor, y: Tensor | None) -> None:
        self._count(site, x)
        original = self.originals.get(site)
        if y is not None and original is not None:
            moved = (original - y).reshape(-1, y.shape[-1])
            product = torch.mm(moved.T, x.reshape(-1, x.shape[-1]))  # in the type that the model multiplies in
            power = moved.float().square_().sum(0)
            if site in self._drifts:
                for total, part in zip(self._drifts[site], (product, power), strict=True):
                    total.add_(part)
            else:
                self._drifts[site] = product.float(), power

    def _count(self, site: Site, x: Tensor) -> None:
        if self._last is not None and self._last[0] is x:
            self._sites.setdefault(site, self._last[1])
            return
        found = self._sites.get(site)
        if found is None:
            observer = self._observer() if self._observer else None
            found = self._sites[site] = InputStatistics(self._wanted, self._every, observer)
        found.add(x.reshape(-1, x.shape[-1]))
        self._last = (x, found)
