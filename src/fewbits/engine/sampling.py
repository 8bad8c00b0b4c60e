"""From logits to the next token: what survives the filters, and one draw among it.

The filters come in the order of transformers' logits processors, and keep what those keep:

    repetition penalty   logits of tokens that are there already are divided by it, negative ones multiplied
                         (Keskar et al. 2019, arXiv:1909.05858, section 4.1)
    temperature          logits are divided by it
    top_k                the k highest, and whatever equals the last of them
    top_p                the fewest that together reach this probability (Holtzman et al. 2019, arXiv:1904.09751)
    min_p                those at least this probable, relative to the most probable one (Nguyen et al. 2024,
                         arXiv:2407.01082)

A vocabulary has 128,000 words and more, and a token is to cost a fraction of a millisecond here. So nothing is sorted
as a whole: top_k takes a partition (0.1 ms), top_p the head of the distribution, as much as it turns out to need, and
the draw sums up blocks before it looks into one of them.

Every token takes exactly one number of the generator, so a seed's text is the same however the tokens were come by, one
at a time or as checked drafts (`speculation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewbits.errors import CheckpointError, RequestError

Logits = NDArray[np.float32]
Tokens = NDArray[np.int32]

TEMPERATURE = 0.8
"""Where neither the caller nor the checkpoint says anything: some variety, and little nonsense."""
HEAD = 256
"""Candidates that top_p looks at first."""
DRAWN = 512
"""Weights that are summed up at once before a draw."""
UNBOUNDED = float("inf")
RANGES: Mapping[str, tuple[float, float, str]] = {
    "temperature": (0, UNBOUNDED, "0 (always the most likely token) or more"),
    "top_k": (0, UNBOUNDED, "0 (all tokens) or more"),
    "top_p": (0, 1, "between 0 and 1 (all tokens)"),
    "min_p": (0, 1, "between 0 (all tokens) and 1"),
    "repetition_penalty": (1e-6, UNBOUNDED, "above 0 (1 changes nothing)"),
    "seed": (0, UNBOUNDED, "0 or more"),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; seed None draws differently every time.

    Raises RequestError for a value out of its range.
    """

    temperature: float = TEMPERATURE
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, required) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and value < UNBOUNDED):
                raise RequestError(f"{name} is {value}; it must be {required}")

    @classmethod
    def of(cls, defaults: Mapping[str, Any], **asked: Any) -> Sampling:
        """What is asked for (None: not), then what generation_config.json recommends, then fewbits' defaults.

        A checkpoint that says `do_sample: false` is greedy.
        """
        names = [field.name for field in fields(cls)]
        said = {name: defaults[name] for name in names if defaults.get(name) is not None}
        if defaults.get("do_sample") is False:
            said["temperature"] = 0.0
        return cls(**said | {name: value for name, value in asked.items() if value is not None})

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


@dataclass(frozen=True, eq=False)
class Distribution:
    """What may come next: tokens [n], None for the whole vocabulary, and their weights [n], the largest of them 1."""

    tokens: NDArray[np.intp] | None
    weights: NDArray[np.float32]

    def draw(self, uniform: float) -> int:
        """The token at a point of [0, 1) of the cumulative distribution."""
        place = _place(self.weights, uniform)
        return place if self.tokens is None else int(self.tokens[place])

    def only(self, kept: NDArray[np.intp]) -> Distribution:
        return Distribution(kept if self.tokens is None else self.tokens[kept], self.weights[kept])


def choose(logits: Logits, history: Tokens, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token. logits [vocabulary]; history: the tokens so far, those of the prompt too.

    Raises CheckpointError where the logits are no numbers.
    """
    uniform = rng.random()
    if sampling.temperature == 0:
        scores = _penalised(logits, history, sampling.repetition_penalty)
        token = int(scores.argmax())
        _require_number(scores[token])
        return token
    return distribution(logits, history, sampling).draw(uniform)


def distribution(logits: Logits, history: Tokens, sampling: Sampling) -> Distribution:
    """What survives all filters, at a temperature above 0."""
    scores = _penalised(logits, history, sampling.repetition_penalty)
    _require_number(scores.max())
    tokens = _highest(scores, sampling.top_k)
    found = Distribution(tokens, _weights(scores if tokens is None else scores[tokens], sampling.temperature))
    if sampling.top_p < 1:
        found = found.only(_nucleus(found.weights, sampling.top_p))
    if sampling.min_p > 0:
        found = found.only(np.flatnonzero(found.weights >= np.float32(sampling.min_p)))
    return found


def logprobs(logits: Logits, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural logarithms of the model's own probabilities, before any filter: of a token, and the `top` highest."""
    highest = logits.max()
    total = highest + np.log(np.exp(logits - highest).sum(dtype=np.float64))
    ranked = _ranked(logits, top).tolist() if top else []
    return float(logits[token] - total), tuple((place, float(logits[place] - total)) for place in ranked)


def _penalised(logits: Logits, history: Tokens, penalty: float) -> Logits:
    """A token that came up twice is penalised once."""
    if penalty == 1:
        return logits
    scores, seen = logits.copy(), logits[history]
    scores[history] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return scores


def _weights(scores: Logits, temperature: float) -> NDArray[np.float32]:
    """exp((score − highest) / temperature), in one new array: half a megabyte for a large vocabulary."""
    made: NDArray[np.float32] = scores - scores.max()
    made /= np.float32(temperature)
    np.exp(made, out=made)
    return made


def _highest(scores: Logits, count: int) -> NDArray[np.intp] | None:
    """Places of the `count` highest scores and of those equal to the last of them, in order; None for all."""
    if not 0 < count < len(scores):
        return None
    last = np.partition(scores, len(scores) - count)[len(scores) - count]
    return np.flatnonzero(scores >= last)


def _nucleus(weights: NDArray[np.float32], probability: float) -> NDArray[np.intp]:
    """Places of the fewest weights that reach this part of their sum, highest first; at least one."""
    needed, count = probability * weights.sum(dtype=np.float64), HEAD
    while True:
        order = _ranked(weights, count)
        sorted_ = weights[order].astype(np.float64)
        kept = int(np.searchsorted(np.cumsum(sorted_) - sorted_, needed))  # those with less than that in front of them
        if kept < len(order) or len(order) == len(weights):
            return order[: max(kept, 1)]
        count *= 16


def _ranked(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Places of the `count` highest values, highest first."""
    places = _highest(values, count)
    if places is None:
        return np.argsort(-values, kind="stable")
    return places[np.argsort(-values[places], kind="stable")[:count]]


def _place(weights: NDArray[np.float32], uniform: float) -> int:
    """Where `uniform` of the weights' sum is reached: in which block, then where in that."""
    whole = len(weights) // DRAWN * DRAWN
    sums = weights[:whole].reshape(-1, DRAWN).sum(axis=1, dtype=np.float64)
    ends = np.cumsum(np.append(sums, weights[whole:].sum(dtype=np.float64)))
    wanted = uniform * ends[-1]
    block = min(int(np.searchsorted(ends, wanted, side="right")), len(ends) - 1)
    inside = np.cumsum(weights[block * DRAWN : (block + 1) * DRAWN], dtype=np.float64)
    place = int(np.searchsorted(inside, wanted - (ends[block - 1] if block else 0.0), side="right"))
    return _with_weight(weights, block * DRAWN + place)


def _with_weight(weights: NDArray[np.float32], place: int) -> int:
    """The sums above are rounded, so `place` may be just behind the last token that has a weight."""
    while place >= len(weights) or weights[place] == 0:
        place -= 1
    return place


def _require_number(value: np.float32) -> None:
    if not np.isfinite(value):
        raise CheckpointError(f"the model's highest logit is {value}, which is no number; its weights are damaged")
