"""How much the predictions feel it when a matrix changes: the curvature of the divergence, from gradients.

Let g be the gradient, by what a layer W returns for a token, of the log-probability of labels that the model itself
draws. Their mean is zero and their covariance is Fisher's information, which is the second derivative of the divergence
between the model and itself changed (Amari 1998, Natural Gradient, section 3). So a change of the matrix by E costs

    KL ≈ ½ · mean over tokens (gᵀ·E·x)²  ≈  ½ · Σ_i rows_i · (e_i · inner · e_iᵀ)       nats a token

with e_i the rows of E, rows_i the mean of g_i² and inner the mean of x·xᵀ in which a token counts by its |g|². Two
things are left out: the rows' errors are taken to be independent, as rounding makes them, and so are tokens
(Martens and Grosse 2015, K-FAC, arXiv:1503.05671, who keep the unweighted mean). Of a small Llama's matrices in 4 bits
it finds the divergence within 8 % for those of feed-forwards and within 30 % for those of attention, where errors at
different tokens meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewbits.kernels.gram import add_gram, mirror
from fewbits.stats.watch import Site, Watcher


@dataclass(frozen=True, eq=False)
class Curvature:
    """One use of a matrix [N, K]. rows: [N]; inner: [K, K]; float32, each with a dimension of experts before it where
    the matrix has one.
    """

    rows: Tensor
    inner: Tensor

    def of_rows(self, error: Tensor, rows: Tensor) -> Tensor:
        """Nats a token that errors [..., n, K] of some rows (int64 [n]) cost, each of them, [..., n]."""
        return 0.5 * self.rows[..., rows] * ((error @ self.inner) * error).sum(-1)


@dataclass
class CurvatureSums:
    """Sums over the tokens that have passed. rows [N]: g²; inner [K, K]: above its diagonal, |g|²·x·xᵀ."""

    rows: Tensor
    inner: Tensor
    weight: float = 0.0
    tokens: int = 0

    @classmethod
    def of(cls, out_features: int, in_features: int, device: torch.device) -> CurvatureSums:
        return cls(torch.zeros(out_features, device=device), torch.zeros(in_features, in_features, device=device))

    def add(self, x: Tensor, weight: Tensor, rows: Tensor) -> None:
        """Count tokens: x [T, K], |g|² of each [T], and their sum of g² [N]."""
        self.rows += rows
        add_gram(self.inner, (x * weight.sqrt().unsqueeze(1)).to(x.dtype))
        self.weight += float(weight.sum())
        self.tokens += len(x)

    def curvature(self, tokens: int) -> Curvature:
        """Means over so many tokens: all that ran, whether they came by here or not."""
        mirror(self.inner)
        return Curvature(self.rows / max(1, tokens), self.inner / max(self.weight, torch.finfo(torch.float32).tiny))


class CurvatureCollector(Watcher):
    """Within it, `parameters` (name -> tensor, 2-D or fused 3-D) are watched as the model runs and as gradients come
    back; what comes back must be those of a sum, over tokens, of log-probabilities of drawn labels.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(parameters)
        self._sites: dict[Site, CurvatureSums] = {}

    def see(self, site: Site, x: Tensor, y: Tensor | None) -> None:
        if y is not None and y.requires_grad:
            y.register_hook(partial(self._count, site, x.detach()))

    def curvatures(self, tokens: int) -> dict[Site, Curvature]:
        """By site; an expert that no token came to has none."""
        return {site: sums.curvature(tokens) for site, sums in self._sites.items()}

    def _count(self, site: Site, x: Tensor, slope: Tensor) -> None:
        x, slope = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
        if site not in self._sites:
            self._sites[site] = CurvatureSums.of(slope.shape[1], x.shape[1], x.device)
        squares = slope.float().square()
        self._sites[site].add(x, squares.sum(1), squares.sum(0))
