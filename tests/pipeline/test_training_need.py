"""What training is said to take: counted by hand, and in words that say when it is too much."""

from __future__ import annotations

import os

import pytest

from fewbits.pipeline import _training_need
from fewbits.pipeline._training_need import in_words, training_need
from fewbits.results import Estimate


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred tokens through two layers leave 2·(12·8 + 4·20) numbers each, and four copies of 50 predictions."""
    monkeypatch.setattr(_training_need, "resident_memory", lambda: 0)
    config = {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 50}
    need = training_need(config, parameters=1000, trained=600, tokens=100)
    assert need.peak_memory == (900 << 20) + 4 * 1000 + 28 * 600 + 4 * 100 * (2 * (96 + 80) + 200)
    assert need.disk == 24 * 600
    assert training_need({"text_config": config}, 1000, 600, 100) == need


def test_more_than_the_machine_has() -> None:
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = in_words(Estimate(10**8, 2 * 10**8, 0.0))
    assert fits == "training takes about 0.1 GB of memory and 0.2 GB of disk"
    assert "make --batch or --window smaller" in in_words(Estimate(2 * has, 0, 0.0))
