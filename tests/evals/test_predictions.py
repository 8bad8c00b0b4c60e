"""Where predictions differ: comparisons made by hand, and a tokenizer of words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.evals.divergence import Comparison
from fewbits.evals.evaluation import Compared, compare, evaluate
from fewbits.evals.predictions import SEEN, behind, by_certainty, by_position, by_token, predictions, quantiles
from fewbits.evals.text import Windows
from fewbits.evals.tokenizer import tokenizer_of


class Words:
    """Token 3 is ' w3' behind another token, and 'w3' alone."""

    def decode(self, tokens, **_):
        return " ".join(f"w{token}" for token in tokens)


def comparison(kld, reference_top, top, probability) -> Comparison:
    made = Comparison()
    for i in range(len(kld)):
        made.kld.append(torch.tensor(kld[i], dtype=torch.float64))
        made.reference_top.append(torch.tensor(reference_top[i]))
        made.top.append(torch.tensor(top[i]))
        made.reference_top_probability.append(torch.tensor(probability[i], dtype=torch.float64))
        made.top_probability.append(torch.tensor(probability[i], dtype=torch.float64) / 2)
    return made


TWO = comparison(
    kld=[[0.1, 0.4], [0.2, 0.0]],
    reference_top=[[5, 6], [7, 8]],
    top=[[5, 9], [9, 8]],
    probability=[[0.95, 0.25], [0.21, 1.0]],
)
IDS = torch.tensor([[1, 2, 3], [1, 4, 8]])


def test_positions_have_means_and_errors_among_windows() -> None:
    first, second = by_position(np.array([[0.1, 0.4], [0.2, 0.0]]))
    assert (first.first, first.last, second.first, second.last) == (1, 1, 2, 2)
    assert first.kld.value == pytest.approx(0.15)
    assert first.kld.error == pytest.approx(0.05)  # of 0.1 and 0.2: deviation 0.0707, over the root of two windows


def test_bins_of_positions_cover_each_once() -> None:
    found = list(by_position(np.zeros((2, 255))))
    assert len(found) == 24
    assert [each.first for each in found[1:]] == [each.last + 1 for each in found[:-1]]
    assert (found[0].first, found[-1].last) == (1, 255)
    assert {each.last - each.first + 1 for each in found} == {10, 11}


def test_quantiles_are_the_smallest_that_reach_a_share() -> None:
    found = dict(quantiles(np.arange(1.0, 101.0).reshape(4, 25)))
    assert (found[0.01], found[0.5], found[0.99], found[1.0]) == (1, 50, 99, 100)


def test_agreement_by_certainty() -> None:
    found = list(by_certainty(TWO))
    assert [(each.low, each.tokens, each.agreement) for each in found] == [(0.2, 2, 0.0), (0.9, 2, 1.0)]


def test_tokens_behind_which_most_of_it_lies() -> None:
    ids = torch.tensor([[1] * SEEN + [2] * SEEN + [3, 0]])
    kld = np.array([[0.1] * SEEN + [0.3] * SEEN + [9.0]])
    found = by_token(kld, ids, Words())
    assert [(each.text, each.times) for each in found] == [("w2", SEEN), ("w1", SEEN)]  # 3 was read once
    assert found[0].mean_kld == pytest.approx(0.3)
    assert found[0].share == pytest.approx(0.3 * SEEN / (0.4 * SEEN + 9))


def test_places_where_the_tokens_part_and_a_passage() -> None:
    found = predictions(Compared(None, Windows(IDS, "two windows"), TWO), Words())
    furthest, other = found.partings
    assert (furthest.before, furthest.came, furthest.kld) == ("w1 w2", " w3", 0.4)
    assert (furthest.original.text, furthest.model.text) == (" w6", " w9")
    assert (furthest.original.probability, furthest.model.probability) == (0.25, 0.125)
    assert (other.before, other.kld) == ("w1", 0.2)
    assert [each.text for each in found.passage] == ["w1", " w2", " w3"]  # of two windows the one further away
    assert [each.kld for each in found.passage] == [None, 0.1, 0.4]
    assert [each.parted for each in found.passage] == [None, None, (" w6", " w9")]


def test_a_token_behind_another_keeps_its_space() -> None:
    assert behind(Words(), 1, 2) == " w2"


def test_a_real_model_has_the_figures_of_evaluate(stories, damaged) -> None:
    settings = {"windows": 4, "length": 48}
    found = compare(damaged, stories, **settings)
    assert found.evaluation == evaluate(damaged, stories, **settings)
    told = predictions(found, tokenizer_of(stories))
    mean = found.evaluation.mean_kld.value
    sizes = [each.last - each.first + 1 for each in told.positions]
    assert np.average([each.kld.value for each in told.positions], weights=sizes) == pytest.approx(mean)
    agreement = np.average([c.agreement for c in told.certainties], weights=[c.tokens for c in told.certainties])
    assert agreement == pytest.approx(found.evaluation.top1_agreement.value)
    assert dict(told.quantiles)[0.99] == found.evaluation.kld_99.value
    assert all(0 < each.original.probability <= 1 and each.original.text != each.model.text for each in told.partings)
    assert "".join(each.text for each in told.passage[1:]).count(" ") > 5
