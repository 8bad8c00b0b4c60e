"""One function for all text to calibrate on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from fewbits.engine import load
from fewbits.errors import UnsupportedError
from fewbits.evals import calibration_windows, read_windows, self_text


def test_a_file_is_read_with_the_models_tokenizer(stories, shared_text):
    path = shared_text / "tinystories-calib.jsonl"
    found = calibration_windows(path, stories, 4, 32)
    expected = read_windows(path, AutoTokenizer.from_pretrained(stories), 4, 32)
    assert found.digest == expected.digest
    assert found.tokens == 4 * 32
    assert calibration_windows(f"{path}:text", stories, 4, 32).digest == expected.digest


def test_self_is_what_the_model_writes(stories):
    found = calibration_windows("self", stories, 3, 16, seed=5)
    assert torch.equal(found.ids, self_text(load(stories), 3, 16, seed=5).ids)
    assert found.description == "written by the original (seed 5), 3 windows of 16 tokens"


def test_more_windows_than_are_written_at_once(stories):
    """The first windows are those of a shorter text, the others are new, and the progress ends where it should."""
    seen = []
    long = calibration_windows("self", stories, 40, 8, progress=lambda *step: seen.append(step))
    assert long.ids.shape == (40, 8)
    assert torch.equal(long.ids[:32], calibration_windows("self", stories, 32, 8).ids)
    assert not torch.equal(long.ids[32:], long.ids[:8])
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (320, 320, "text")


def test_text_that_was_written_can_be_trained_on(stories):
    """Ids made in inference mode could not be embedded where gradients are recorded."""
    assert not calibration_windows("self", stories, 1, 4).ids.is_inference()


def test_a_model_too_large_to_write_is_refused_before_it_is_read(stories, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    monkeypatch.setattr("fewbits.evals.calibration.load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UnsupportedError, match=r"GB in float32, and 0\.0 GB are free; name a text: --calibration"):
        calibration_windows("self", stories, 1, 4)
