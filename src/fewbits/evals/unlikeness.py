"""Is calibration text unlike the text that a model is evaluated on? Users are rarely told, and it decides the result.

Two measures, because each misses what the other sees:

- how often the commonest tokens occur. The Jensen-Shannon divergence (Lin 1991) of the two distributions over the 512
  commonest tokens and "any other", in nats: 0 where they are the same, ln 2 where nothing is shared. Rare tokens are
  left out because they are the names and topics of one book. Samples of one text diverge too, the more the shorter they
  are; what whole windows dealt at random into two piles diverge on average is subtracted;
- how hard the text is for the original, where its mean losses are known: text in a language that a model cannot read
  has a far higher loss, whatever its tokens.

Measured on windows of 256 tokens, 4096 tokens in the vocabulary, 128 (or 32) windows against 24, beyond chance: books
against other books 0.10 to 0.13, sampled at other places 0.02 to 0.12; plays 0.15 to 0.16, encyclopedia 0.20 to 0.21,
tales for children 0.17 to 0.18, random tokens more; a model's own text against books 0.03. So the limit separates kinds
of text, not authors, and a text that passes may still be a poor choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.evals.text import Windows

COMMON = 512  # tokens that are counted apart
SHUFFLES = 20
DIVERGENCE_LIMIT = 0.135  # nats beyond chance
LOSS_LIMIT = 1.0  # nats a token


@dataclass(frozen=True)
class Unlikeness:
    """How far two texts are apart.

    divergence: of their common tokens, nats; by_chance: what two halves of one and the same text would show on average.
    loss_gap: the original's mean loss on the first text less that on the second, nats a token; None if not measured.
    warning: a sentence if they are further apart than texts of one kind are, else None.
    """

    divergence: float
    by_chance: float
    loss_gap: float | None
    warning: str | None


def unlikeness(calibration: Windows, evaluation: Windows, losses: tuple[float, float] | None = None) -> Unlikeness:
    """Compare two texts of one tokenizer, each two windows or more. losses: the original's mean loss on each, nats."""
    counts = _counts(calibration.ids, evaluation.ids)
    piles = len(calibration.ids)
    divergence = _divergence(counts[:piles], counts[piles:])
    by_chance = _by_chance(counts, piles)
    gap = None if losses is None else losses[0] - losses[1]
    reasons = []
    if divergence - by_chance > DIVERGENCE_LIMIT:
        reasons.append(
            f"their common tokens diverge by {divergence - by_chance:.2f} nats beyond chance "
            f"(texts of one kind: less than {DIVERGENCE_LIMIT:g})"
        )
    if gap is not None and abs(gap) > LOSS_LIMIT:
        reasons.append(f"the original's mean loss differs by {gap:+.1f} nats a token (limit {LOSS_LIMIT:g})")
    return Unlikeness(divergence, by_chance, gap, _sentence(calibration, evaluation, reasons))


def _sentence(calibration: Windows, evaluation: Windows, reasons: list[str]) -> str | None:
    if not reasons:
        return None
    return (
        f"the calibration text ({calibration.description}) is unlike the evaluation text ({evaluation.description}): "
        f"{' and '.join(reasons)}; calibrate on text of the kind that the model is for"
    )


def _counts(a: Tensor, b: Tensor) -> Tensor:
    """How often each common token, and any other, occurs in each window: float64 [windows of both, COMMON + 1]."""
    size = int(max(a.max(), b.max())) + 1
    frequency = sum(ids.flatten().bincount(minlength=size).double() / ids.numel() for ids in (a, b))
    assert isinstance(frequency, Tensor)
    common = frequency.topk(min(COMMON, size)).indices
    column = torch.full((size,), len(common))
    column[common] = torch.arange(len(common))
    rows = [column[window].bincount(minlength=len(common) + 1) for window in (*a, *b)]
    return torch.stack(rows).double()


def _by_chance(counts: Tensor, piles: int) -> float:
    """Mean divergence where the windows of both texts are dealt at random into piles of the same sizes."""
    generator = torch.Generator().manual_seed(0)
    found = 0.0
    for _ in range(SHUFFLES):
        dealt = counts[torch.randperm(len(counts), generator=generator)]
        found += _divergence(dealt[:piles], dealt[piles:])
    return found / SHUFFLES


def _divergence(a: Tensor, b: Tensor) -> float:
    """Jensen-Shannon divergence, nats, of the tokens in two piles of windows."""
    p, q = (counts.sum(0) / counts.sum() for counts in (a, b))
    middle = (p + q) / 2
    return float(_entropy(middle) - (_entropy(p) + _entropy(q)) / 2)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum()
