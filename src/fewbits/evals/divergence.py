"""How far a model's predictions are from the original's: divergence, agreement, perplexity, with standard errors.

The figure that counts is the Kullback-Leibler divergence of the next-token distributions,

    KL(p ‖ q) = Σ_t p(t) · (ln p(t) − ln q(t))   in nats, p the original, q the quantized model

because it compares everything that a model says, not only how likely it found the one token that came next. Perplexity,
exp(mean of −ln q(token)), can stay the same while predictions change. The mean tells how much is lost, the 99th
percentile how bad it gets where it is bad.

Standard errors come from resampling whole windows with replacement (the bootstrap, Efron 1979), because predictions
within a window are not independent. One mechanism serves means, percentiles and ratios: a resample is a count of how
often each window was drawn, and each figure is a function of these counts. The variance among resamples of n windows
has n in its denominator where an unbiased one has n − 1, hence the factor √(n / (n − 1)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbits.errors import UnsupportedError, VerificationError
from fewbits.results import Figure

RESAMPLES = 500
SEED = 0
CHUNK = 1 << 21
"""Logits taken to float64 at a time: 16 MB."""
FLOOR = -1000.0
"""Least log-probability that counts, in nats: that of a masked token is −Inf, and −Inf − (−Inf) is not a number."""


def kl_divergence(original: Tensor, other: Tensor) -> Tensor:
    """KL(original ‖ other) of logits [T, vocab] (or log-probabilities: a constant added to a row does not matter).

    In nats, float64 [T], never negative but for rounding (1e-15).
    """
    parts = []
    for rows in _chunks(original):
        p, q = _log_softmax(original[rows]), _log_softmax(other[rows])
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """−ln probability of each token [T] at logits [T, vocab], in nats, float64 [T]."""
    parts = [-_log_softmax(logits[rows]).gather(-1, tokens[rows, None]).squeeze(-1) for rows in _chunks(logits)]
    return torch.cat(parts)


def top_probability(logits: Tensor) -> Tensor:
    """Probability of the most likely token at logits [T, vocab], float64 [T]."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp().double()


def require_numbers(logits: Tensor, name: str) -> None:
    """Raise VerificationError if logits hold NaN."""
    if bool(logits.isnan().any()):
        raise VerificationError(f"{name}: its logits hold NaN, so it predicts nothing; its weights are damaged")


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).clamp_min_(FLOOR)


def _chunks(logits: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


@dataclass
class Comparison:
    """What is kept of each window: a few numbers a token, float64 [length − 1] each, on the CPU.

    top is the most likely token (int64), top_probability its probability, reference_… are the original's.
    """

    reference_loss: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    kld: list[Tensor] = field(default_factory=list)
    reference_top: list[Tensor] = field(default_factory=list)
    top: list[Tensor] = field(default_factory=list)
    reference_top_probability: list[Tensor] = field(default_factory=list)
    top_probability: list[Tensor] = field(default_factory=list)

    @property
    def agrees(self) -> list[Tensor]:
        """1 where the most likely tokens are the same."""
        return [(ours == theirs).double() for ours, theirs in zip(self.top, self.reference_top, strict=True)]

    def figures(self) -> dict[str, Figure]:
        """Every figure of results.Evaluation, by its name there."""
        reference, loss, kld, agrees = (
            torch.stack(kept).numpy() for kept in (self.reference_loss, self.loss, self.kld, self.agrees)
        )
        statistics: dict[str, Statistic] = {
            "perplexity": lambda counts: math.exp(_mean(loss, counts)),
            "reference_perplexity": lambda counts: math.exp(_mean(reference, counts)),
            "perplexity_ratio": lambda counts: math.exp(_mean(loss - reference, counts)),
            "mean_kld": lambda counts: _mean(kld, counts),
            "median_kld": Quantile(kld, 0.5),
            "kld_99": Quantile(kld, 0.99),
            "top1_agreement": lambda counts: _mean(agrees, counts),
        }
        return bootstrap(statistics, len(loss))


Statistic: TypeAlias = Callable[[NDArray[np.int64]], float]
"""A figure as a function of how often each window counts, [windows]."""


def bootstrap(statistics: Mapping[str, Statistic], windows: int) -> dict[str, Figure]:
    """Each statistic of all windows, with its standard error over the same resamples of them.

    Raises UnsupportedError for fewer than two windows.
    """
    require_windows(windows)
    generator = np.random.default_rng(SEED)
    counts = generator.multinomial(windows, np.full(windows, 1 / windows), size=RESAMPLES)
    once, correction = np.ones(windows, np.int64), math.sqrt(windows / (windows - 1))
    return {
        name: Figure(statistic(once), float(np.std([statistic(count) for count in counts], ddof=1)) * correction)
        for name, statistic in statistics.items()
    }


def require_windows(windows: int) -> None:
    """Raise UnsupportedError where there are too few windows for a standard error."""
    if windows < 2:
        raise UnsupportedError(
            f"{windows} window gives no standard error; evaluate on 2 or more (a longer text, or shorter windows)"
        )


class Quantile:
    """The smallest of some values [windows, tokens] that at least a share q of them all does not exceed."""

    def __init__(self, values: NDArray[np.float64], q: float) -> None:
        order = values.ravel().argsort()
        self._values, self._q = values.ravel()[order], q
        self._window = order // values.shape[1]

    def __call__(self, counts: NDArray[np.int64]) -> float:
        reached = counts[self._window].cumsum()
        return float(self._values[np.searchsorted(reached, math.ceil(self._q * reached[-1]))])


def _mean(values: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Mean over the tokens of windows [windows, tokens] that count so many times."""
    return float(counts @ values.mean(1) / counts.sum())
