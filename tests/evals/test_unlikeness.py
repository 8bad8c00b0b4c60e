"""Texts of one kind pass, texts of another are named."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer

from fewbits.engine import load
from fewbits.evals import Windows, read_windows, self_text, unlikeness

LN2 = math.log(2)


@pytest.fixture(scope="module")
def read(shared_models, shared_text):
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "books")
    return lambda name, windows: read_windows(shared_text / name, tokenizer, windows)


@pytest.mark.parametrize("windows", [32, 128])
def test_other_books_are_like_books(read, windows):
    found = unlikeness(read("books-calib.txt", windows), read("books-valid.txt", 24))
    assert found.warning is None
    assert found.divergence > found.by_chance


@pytest.mark.parametrize("name", ["shakespeare.txt", "tinystories-eval.jsonl", "wikitext2-valid.txt"])
@pytest.mark.parametrize("windows", [32, 128])
def test_another_kind_of_text_is_unlike_books(read, name, windows):
    found = unlikeness(read("books-calib.txt", windows), read(name, 24))
    assert found.warning is not None
    assert (
        f"(books-calib.txt, {windows} windows of 256 tokens) is unlike the evaluation text ({name}, " in found.warning
    )
    assert f"diverge by {found.divergence - found.by_chance:.2f} nats beyond chance" in found.warning


def test_random_tokens_are_unlike_anything(read):
    ids = torch.randint(4096, (24, 256), generator=torch.Generator().manual_seed(0))
    assert unlikeness(Windows(ids, "noise"), read("books-valid.txt", 24)).warning


def test_what_a_model_writes_is_like_what_it_was_trained_on(read, shared_models):
    written = self_text(load(shared_models / "books"), windows=16, length=128)
    assert unlikeness(written, read("books-valid.txt", 24)).warning is None


def test_divergence_by_hand():
    """Two texts that share no token: ln 2. Two that are the same: 0."""
    a, b = Windows(torch.zeros(4, 8, dtype=torch.int64), "a"), Windows(torch.ones(4, 8, dtype=torch.int64), "b")
    assert unlikeness(a, b).divergence == pytest.approx(LN2)
    assert unlikeness(a, a).divergence == unlikeness(a, a).by_chance == 0


def test_divergence_of_two_samples_of_one_distribution_is_chance():
    """Its mean over samples of n and m tokens is (k − 1)/8 · (1/n + 1/m) (Menéndez et al. 1997), here 0.0078."""
    generator = torch.Generator().manual_seed(0)
    a, b = (Windows(torch.randint(256, (32, 256), generator=generator), "") for _ in range(2))
    found = unlikeness(a, b)
    expected = 255 / 8 * (2 / (32 * 256))
    spread = math.sqrt(2 * 255) / 8 * (2 / (32 * 256))  # of a chi-squared with 255 degrees of freedom
    assert found.by_chance == pytest.approx(expected, abs=5 * spread)
    assert found.divergence == pytest.approx(expected, abs=5 * spread)


def test_a_loss_that_differs_is_named(read):
    a, b = read("books-calib.txt", 8), read("books-calib.txt", 8)
    assert unlikeness(a, b, losses=(4.1, 4.9)).warning is None
    found = unlikeness(a, b, losses=(1.5, 4.0))
    assert found.loss_gap == -2.5
    assert found.warning is not None
    assert "mean loss differs by -2.5 nats a token" in found.warning
    assert "common tokens" not in found.warning
