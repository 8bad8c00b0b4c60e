"""The original's predictions in 16 bits: the error that adds, and files that are damaged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewbits.errors import CheckpointError, OutputError
from fewbits.evals import reference as module
from fewbits.evals.divergence import kl_divergence, token_losses
from fewbits.evals.reference import (
    DEEPEST,
    HIGHEST,
    Prediction,
    cache_folder,
    encoded,
    model_identity,
    open_reference,
    reference_path,
    write_reference,
)
from fewbits.evals.text import Windows

VOCABULARY = 60


def predictions(windows: Windows) -> list[Prediction]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for ids in windows.ids:
        logits = 4 * torch.randn(len(ids) - 1, VOCABULARY, generator=generator)
        made.append(Prediction(token_losses(logits, ids[1:]), logits.argmax(-1), logits))
    return made


@pytest.fixture
def windows() -> Windows:
    return Windows(torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1)), "a text")


@pytest.fixture
def path(windows):
    path = reference_path({"model": "m"})
    write_reference(path, windows, VOCABULARY, {"model": "m"}, predictions(windows))
    return path


def decoded(log_p: torch.Tensor) -> torch.Tensor:
    high, span, codes = encoded(log_p)
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= HIGHEST
    return high[:, None] - span[:, None] * (codes.double() / HIGHEST) ** 2


def test_what_is_read_is_what_was_written(windows, path):
    reference = open_reference(path)
    assert torch.equal(reference.windows.ids, windows.ids)
    assert reference.windows.description == "a text"
    assert reference.vocabulary == VOCABULARY
    for found, meant in zip(reference, predictions(windows), strict=True):
        assert torch.equal(found.loss, meant.loss)
        assert torch.equal(found.top, meant.top)
        expected = decoded(meant.logits.log_softmax(-1))
        # Decoding in float32 rounds four times, each by at most half a unit in the last place of the range, below 64.
        torch.testing.assert_close(found.logits.double(), expected, rtol=0, atol=4 * 64 * 2.0**-24)


def test_half_a_step_is_the_error_of_a_log_probability():
    """|error| ≤ √(d · range) / 65535 + range / (4 · 65535²), and float32's own rounding of ln p."""
    log_p = (6 * torch.randn(50, 999, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    high, span, _ = (x.double() for x in encoded(log_p))
    depth = high[:, None] - log_p
    bound = (depth * span[:, None]).sqrt() / HIGHEST + span[:, None] / (4 * HIGHEST**2) + 4 * span[:, None] * 2.0**-24
    error = (decoded(log_p) - log_p).abs()
    assert (error <= bound).all()
    assert error.max() > bound.max() / 4  # the bound is not idle


def test_probabilities_of_nothing_are_stored_as_nothing():
    found = decoded(torch.tensor([[0.5, 0.5, 0.0]]).log())
    assert found[0, :2].tolist() == pytest.approx([math.log(0.5)] * 2)
    assert found[0, 2] == pytest.approx(math.log(0.5) - DEEPEST)


def test_a_uniform_distribution_survives():
    log_p = torch.full((1, 8), -math.log(8))
    assert decoded(log_p)[0].tolist() == pytest.approx([-math.log(8)] * 8, rel=1e-6)


def test_sixteen_bits_move_a_divergence_by_less_than_a_millionth():
    """At every size of divergence from 1e-6 to 1 nat, averaged over 2000 tokens of a peaked distribution."""
    generator = torch.Generator().manual_seed(4)
    ranks = -1.3 * torch.arange(1, 2001).log()  # Zipf
    p = ranks[torch.argsort(torch.rand(2000, 2000, generator=generator))] + torch.randn(2000, 2000, generator=generator)
    stored = decoded(p.log_softmax(-1))
    for noise in (0.001, 0.03, 0.3, 1.0):
        q = p + noise * torch.randn(p.shape, generator=generator)
        exact, compressed = kl_divergence(p, q).mean().item(), kl_divergence(stored, q).mean().item()
        assert abs(exact - compressed) < 1e-6


def damage(path, change) -> None:
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def flipped(at: int):
    def change(data: bytearray) -> bytes:
        data[at] ^= 1
        return bytes(data)

    return change


@pytest.mark.parametrize(
    "change",
    [
        flipped(3),  # the magic
        flipped(len(module.MAGIC) + 3),  # the header's length, now absurd
        flipped(len(module.MAGIC) + 10),  # the header
        flipped(-1),  # the last checksum
        flipped(-500),  # a code
        lambda data: bytes(data[:-1]),
        lambda data: bytes(data) + b"x",
        lambda data: bytes(data[:5]),
        lambda data: b"",
        lambda data: b"{}" * 1000,
    ],
)
def test_damage_is_found(path, change):
    damage(path, change)
    with pytest.raises(CheckpointError, match="not a whole reference file"):
        open_reference(path)


def test_every_byte_of_the_tokens_is_checked(path):
    header = int.from_bytes(path.read_bytes()[len(module.MAGIC) :][:4], "little")
    damage(path, flipped(len(module.MAGIC) + 8 + header))
    with pytest.raises(CheckpointError, match="tokens"):
        open_reference(path)


def test_a_run_that_dies_leaves_nothing(windows, cache):
    def dying():
        yield predictions(windows)[0]
        raise KeyboardInterrupt

    path = reference_path({"model": "m"})
    with pytest.raises(KeyboardInterrupt):
        write_reference(path, windows, VOCABULARY, {}, dying())
    assert list(cache.rglob("*.*")) == []


def test_no_room_is_said_before_anything_is_written(windows, monkeypatch):
    size = 3 * (4 * 9 + 8 * (20 + 2 * VOCABULARY) + 4)
    free = type("Usage", (), {"free": size})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OutputError, match=rf"take [\d,]+ bytes, {size:,} are free; set FEWBITS_CACHE"):
        write_reference(reference_path({}), windows, VOCABULARY, {}, iter(()))


def test_the_size_is_known_beforehand(windows, path):
    header_bytes = int.from_bytes(path.read_bytes()[len(module.MAGIC) :][:4], "little")
    data = 3 * (4 * 9 + 8 * (8 + 4 + 4 + 4 + 2 * VOCABULARY) + 4)
    assert path.stat().st_size == len(module.MAGIC) + 8 + header_bytes + data


def test_the_cache_is_where_it_is_told_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FEWBITS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fewbits"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "fewbits"


def test_a_changed_model_has_another_identity(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(100))
    before = model_identity(tmp_path)
    assert model_identity(tmp_path) == before
    file.write_bytes(np.ones(100, np.uint8).tobytes())
    assert model_identity(tmp_path) != before
