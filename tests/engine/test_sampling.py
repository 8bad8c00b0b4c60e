"""Sampling against transformers' logits processors, and draws against the distribution they are of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fewbits.engine.sampling import Sampling, choose, distribution, logprobs
from fewbits.errors import CheckpointError, RequestError

NOTHING = np.zeros(0, np.int32)


def logits_of(seed: int, vocabulary: int = 5000) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocabulary) * 3).astype(np.float32)


def theirs(logits: np.ndarray, history: np.ndarray, s: Sampling) -> np.ndarray:
    """Probabilities [vocabulary] by transformers, in float64 so that the last survivor is no matter of rounding."""
    made = LogitsProcessorList()
    if s.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    made.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        made.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        made.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        made.append(MinPLogitsWarper(s.min_p))
    scores = made(torch.from_numpy(history)[None].long(), torch.from_numpy(logits)[None].double())
    return scores.softmax(-1)[0].numpy()


def ours(logits: np.ndarray, history: np.ndarray, s: Sampling) -> np.ndarray:
    found = distribution(logits, history, s)
    made = np.zeros(len(logits))
    made[slice(None) if found.tokens is None else found.tokens] = found.weights / found.weights.sum(dtype=np.float64)
    return made


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(top_k=40),
    Sampling(top_k=1),
    Sampling(top_k=10_000),
    Sampling(top_p=0.9),
    Sampling(temperature=3.0, top_p=0.99),  # the nucleus is larger than the head that is looked at first
    Sampling(top_p=0.0),
    Sampling(min_p=0.05),
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.7, temperature=1.7, top_k=50, top_p=0.8, min_p=0.1),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_what_survives_is_what_survives_in_transformers(sampling: Sampling) -> None:
    for seed in range(5):
        logits = logits_of(seed)
        history = np.random.default_rng(seed).integers(0, 5000, 300).astype(np.int32)
        expected, found = theirs(logits, history, sampling), ours(logits, history, sampling)
        assert np.array_equal(found > 0, expected > 0)
        # An exponent is rounded three times in float32 (penalty, temperature, − the highest), by 2^-24 of the largest
        # at most; the exponential itself and the sum by a few units.
        largest = np.abs(logits).max() * max(sampling.repetition_penalty, 1 / sampling.repetition_penalty)
        bound = 2.0**-24 * (4 * largest / sampling.temperature + 4)
        np.testing.assert_allclose(found, expected, rtol=bound, atol=0)


def test_ties_at_the_edge_of_top_k_all_survive() -> None:
    logits = np.array([1, 2, 2, 2, 0], np.float32)
    assert distribution(logits, NOTHING, Sampling(top_k=2)).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=7), Sampling(top_p=0.7, temperature=2.0)], ids=str)
def test_draws_have_the_distribution(sampling: Sampling) -> None:
    """χ² of 20,000 draws, of a vocabulary larger than the blocks that the draw sums up; fails by chance once in 1e4."""
    logits = logits_of(1, 1300)
    logits[20:1290] = -np.inf  # what has no probability is never drawn
    rng = np.random.default_rng(7)
    counts = np.bincount([choose(logits, NOTHING, sampling, rng) for _ in range(20_000)], minlength=1300)
    expected = theirs(logits, NOTHING, sampling) * 20_000
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    rest = [counts[~often].sum()], [expected[~often].sum()]
    pairs = (np.append(counts[often], rest[0]), np.append(expected[often], rest[1]))
    kept = pairs[1] > 0
    assert chisquare(pairs[0][kept], pairs[1][kept], sum_check=False).pvalue > 1e-4


def test_the_ends_of_the_unit_interval() -> None:
    weights = distribution(np.array([-np.inf, 0, 1, -np.inf], np.float32), NOTHING, Sampling())
    assert weights.draw(0.0) == 1
    assert weights.draw(np.nextafter(1.0, 0.0)) == 2


def test_greedy_takes_the_highest_after_the_penalty() -> None:
    logits, rng = np.array([3.0, 2.9, -1.0], np.float32), np.random.default_rng(0)
    assert choose(logits, NOTHING, Sampling(temperature=0), rng) == 0
    seen = np.array([0, 0], np.int32)
    assert choose(logits, seen, Sampling(temperature=0, repetition_penalty=1.1), rng) == 1  # 3 / 1.1 < 2.9
    assert logits.tolist() == pytest.approx([3.0, 2.9, -1.0])


def test_one_seed_one_text() -> None:
    logits, sampling = logits_of(3), Sampling(seed=11)
    runs = [
        [choose(logits, NOTHING, sampling, rng) for _ in range(20)]
        for rng in (sampling.generator(), sampling.generator())
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 5


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(5)
    expected = torch.from_numpy(logits).double().log_softmax(-1)
    own, top = logprobs(logits, 17, 5)
    assert own == pytest.approx(expected[17].item(), abs=1e-6)
    values, tokens = expected.topk(5)
    assert [token for token, _ in top] == tokens.tolist()
    assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-6)
    assert logprobs(logits, 17, 0)[1] == ()


def test_what_a_checkpoint_recommends() -> None:
    said = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "seed": None}
    assert Sampling.of(said) == Sampling(temperature=0.6, top_k=20, top_p=0.95)
    assert Sampling.of(said, temperature=1.0, top_k=None) == Sampling(temperature=1.0, top_k=20, top_p=0.95)
    assert Sampling.of({"do_sample": False}).temperature == 0
    assert Sampling.of({}).temperature == 0.8


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"seed": -3}],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(RequestError, match=f"{name} is {value}; it must be"):
        Sampling(**wrong)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(top_k=1)], ids=str)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers(sampling: Sampling, wrong: float) -> None:
    logits = np.array([0.0, wrong, 1.0], np.float32)
    with pytest.raises(CheckpointError, match="no number"):
        choose(logits, NOTHING, sampling, np.random.default_rng(0))


def test_tokens_without_any_probability_may_be_among_the_top_k() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 0.0], np.float32)
    drawn = {choose(logits, NOTHING, Sampling(top_k=3), np.random.default_rng(seed)) for seed in range(50)}
    assert drawn == {1, 3}
