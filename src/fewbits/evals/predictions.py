"""Where predictions differ: by position, by how sure the original was, by token, and the places that differ most.

Means hide that most of a divergence lies in few places. What is kept of each token (`divergence.Comparison`) is put in
order here in several ways, each of which answers a question: does a long context make it worse, is it where the
original was undecided anyway, is it behind a few tokens, and what do such places look like.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fewbits.evals.divergence import Comparison
from fewbits.evals.evaluation import Compared
from fewbits.findings import CertaintyBin, Guess, Parting, PositionBin, Predictions, ReadToken, TokenFacts
from fewbits.results import Figure

BINS = 24  # of positions, at most
TENTHS = 10  # bins of probability
QUANTILES = (0.01, 0.02, 0.05, *(i / 20 for i in range(2, 19)), 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
SEEN = 8  # times that a token is read, for its mean to mean something
TOKENS, PARTINGS = 8, 10  # listed
CONTEXT = 14  # tokens in front of a parting

Array = NDArray[np.float64]


def predictions(found: Compared, tokenizer: PreTrainedTokenizerBase) -> Predictions:
    """All of it, from what was found at every token."""
    comparison, ids = found.comparison, found.windows.ids
    kld = _stacked(comparison.kld)
    return Predictions(
        evaluation=found.evaluation,
        positions=tuple(by_position(kld)),
        quantiles=tuple(quantiles(kld)),
        certainties=tuple(by_certainty(comparison)),
        tokens=tuple(by_token(kld, ids, tokenizer)),
        partings=tuple(partings(comparison, ids, tokenizer)),
        passage=tuple(passage(comparison, ids, tokenizer)),
    )


def by_position(kld: Array) -> Iterator[PositionBin]:
    """Means over equal stretches of the windows, kld [windows, T]; standard errors are those among windows."""
    windows, length = kld.shape
    for places in np.array_split(np.arange(length), min(BINS, length)):
        means = kld[:, places].mean(1)
        error = float(means.std(ddof=1)) / math.sqrt(windows)
        yield PositionBin(int(places[0]) + 1, int(places[-1]) + 1, Figure(float(means.mean()), error))


def quantiles(kld: Array) -> list[tuple[float, float]]:
    """(share, the divergence that so large a share of the predictions does not exceed), not below 0."""
    values = np.sort(kld, axis=None).clip(min=0)
    return [(q, float(values[math.ceil(q * len(values)) - 1])) for q in QUANTILES]


def by_certainty(comparison: Comparison) -> Iterator[CertaintyBin]:
    """Agreement of the most likely tokens, by the probability that the original gives its own."""
    sure, agrees = _stacked(comparison.reference_top_probability).ravel(), _stacked(comparison.agrees).ravel()
    bins = np.minimum((sure * TENTHS).astype(int), TENTHS - 1)
    for i in range(TENTHS):
        inside = bins == i
        if inside.any():
            share = float(agrees[inside].mean())
            yield CertaintyBin(i / TENTHS, (i + 1) / TENTHS, int(inside.sum()), share)


def by_token(kld: Array, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[TokenFacts]:
    """The tokens behind which most of the divergence lies, of those that were read SEEN times or more."""
    read, values = ids[:, :-1].numpy().ravel(), kld.ravel()
    sums, times = np.bincount(read, weights=values), np.bincount(read)
    often = np.flatnonzero(times >= SEEN)
    furthest = sorted(often, key=lambda token: -sums[token])[:TOKENS]
    total = max(float(values.sum()), np.finfo(float).tiny)
    return [
        TokenFacts(alone(tokenizer, int(t)), int(times[t]), float(sums[t] / times[t]), float(sums[t]) / total)
        for t in furthest
    ]


def partings(comparison: Comparison, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[Parting]:
    """The places with the largest divergence among those where the most likely tokens differ, one of a window first."""
    kld = _stacked(comparison.kld)
    apart = np.argwhere(_stacked(comparison.agrees) == 0)
    order = sorted(((int(window), int(at)) for window, at in apart), key=lambda place: -kld[place])
    first = {place[0]: place for place in reversed(order)}.values()  # the furthest of each window
    rest = (place for place in order if place not in first)
    chosen = [*sorted(first, key=lambda place: -kld[place]), *rest][:PARTINGS]
    furthest = sorted(chosen, key=lambda place: -kld[place])
    return [_parting(comparison, ids, tokenizer, *place) for place in furthest]


def _parting(comparison: Comparison, ids: Tensor, tokenizer: PreTrainedTokenizerBase, window: int, at: int) -> Parting:
    row = ids[window].tolist()
    seen, last = row[: at + 1], row[at]

    def guess(top: Sequence[Tensor], probability: Sequence[Tensor]) -> Guess:
        return Guess(behind(tokenizer, last, int(top[window][at])), float(probability[window][at]))

    return Parting(
        before=str(tokenizer.decode(seen[-CONTEXT:], skip_special_tokens=True)),
        original=guess(comparison.reference_top, comparison.reference_top_probability),
        model=guess(comparison.top, comparison.top_probability),
        came=behind(tokenizer, last, row[at + 1]),
        kld=float(comparison.kld[window][at]),
    )


def passage(comparison: Comparison, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Iterator[ReadToken]:
    """The window whose mean divergence is the median, token by token."""
    means = _stacked(comparison.kld).mean(1)
    window = int(np.argsort(means)[len(means) // 2])
    row = ids[window].tolist()
    kld, agrees = comparison.kld[window].tolist(), comparison.agrees[window].tolist()
    spelled = cache(lambda last, token: behind(tokenizer, last, token))
    yield ReadToken(alone(tokenizer, row[0]), None, None)
    for i, (last, token) in enumerate(pairwise(row)):
        tops = (int(comparison.reference_top[window][i]), int(comparison.top[window][i]))
        parted = None if agrees[i] else (spelled(last, tops[0]), spelled(last, tops[1]))
        yield ReadToken(spelled(last, token), max(0.0, kld[i]), parted)


def alone(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text by itself."""
    return str(tokenizer.decode([token]))


def behind(tokenizer: PreTrainedTokenizerBase, last: int, token: int) -> str:
    """A token's text behind another one: alone, some tokenizers leave its space out."""
    front, both = str(tokenizer.decode([last])), str(tokenizer.decode([last, token]))
    return both[len(front) :] if both.startswith(front) else alone(tokenizer, token)


def _stacked(kept: Sequence[Tensor]) -> Array:
    found: Array = torch.stack(list(kept)).double().numpy()
    return found
