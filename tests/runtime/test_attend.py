"""Attention over the cache, on every target that this machine runs, against torch's in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

ops = pytest.importorskip("fewbits.runtime._runtime_ops", reason="the kernels were not compiled")

EPS = 2.0**-24  # half a unit in the last place of float32
LEVELS = {"int8": 127, "int4": 7}
KINDS = ["f16", *LEVELS]
each_target = pytest.mark.parametrize("target", ops.targets())


def stored(kind: str, x: np.ndarray) -> np.ndarray:
    """What the cache keeps of x [..., head_dim], by its definition."""
    if kind == "f16":
        return x.astype(np.float16).astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(LEVELS[kind])
    return np.rint(x / scale) * scale


@dataclass
class Text:
    """Keys and values of a sequence, in a cache and beside it. x: float32 [positions, kv_heads, head_dim]."""

    kind: str
    keys: np.ndarray
    values: np.ndarray
    cache: object
    target: str
    slot: int = 0
    layer: int = 0

    @staticmethod
    def random(target: str, kind: str, length: int, kv_heads: int = 2, head_dim: int = 64, slots: int = 1) -> Text:
        rng = np.random.default_rng(length * head_dim)
        keys, values = rng.standard_normal((2, length, kv_heads, head_dim)).astype(np.float32)
        cache = ops.KeyValues(kind, 2, slots, length, kv_heads, head_dim)
        text = Text(kind, keys, values, cache, target, slot=slots - 1, layer=1)
        text.store(0, length)
        return text

    def store(self, begin: int, end: int) -> None:
        rows, head_dim = end - begin, self.keys.shape[-1]
        still = np.ones((rows, head_dim // 2), np.float32)
        keys, values = (x[begin:end].reshape(rows, -1).copy() for x in (self.keys, self.values))
        slots, positions = np.full(rows, self.slot, np.int32), np.arange(begin, end, dtype=np.int32)
        ops.prepare(
            self.target,
            keys.copy(),
            keys,
            values,
            still,
            0 * still,
            None,
            None,
            0.0,
            self.cache,
            self.layer,
            slots,
            positions,
        )


def attended(text: Text, q: np.ndarray, first: int, chunks: list[tuple[int, int]], **how: float) -> np.ndarray:
    """q [rows, heads, head_dim] at positions from `first` on, its rows in the chunks given."""
    rows, heads, head_dim = q.shape
    kv_heads = text.keys.shape[1]
    group = heads // kv_heads
    out = np.full((rows, heads * head_dim), np.nan, np.float32)
    for kv_head in range(kv_heads):
        for begin, end in chunks:
            mine = (kv_head * group, (kv_head + 1) * group)
            place = (text.layer, text.slot, kv_head, mine, (begin, end), first + begin)
            ops.attend(
                text.target, q.reshape(rows, -1), out, text.cache, *place,
                how.get("scale", head_dim**-0.5), how.get("softcap", 0.0), int(how.get("window", 0)),
            )  # fmt: skip
    return out.reshape(q.shape)


def visible(first: int, rows: int, length: int, window: int) -> np.ndarray:
    """Whether row i sees position j, bool [rows, length]."""
    behind = (first + np.arange(rows))[:, None] - np.arange(length)[None]
    return (behind >= 0) & ((behind < window) if window else True)


def exact(text: Text, q: np.ndarray, first: int, **how: float) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and by how much roundings may move it."""
    rows, heads, head_dim = q.shape
    keys, values = (stored(text.kind, x) for x in (text.keys, text.values))
    length, group = len(keys), heads // keys.shape[1]
    sees = torch.from_numpy(visible(first, rows, length, int(how.get("window", 0))))
    q64, k64, v64 = (torch.from_numpy(x).double().transpose(0, 1) for x in (q, keys, values))
    k64, v64 = (x.repeat_interleave(group, 0) for x in (k64, v64))
    scale, softcap = how.get("scale", head_dim**-0.5), how.get("softcap", 0.0)
    if softcap:
        scores = softcap * torch.tanh(scale * q64 @ k64.transpose(1, 2) / softcap)
        out = torch.where(sees, scores, -torch.inf).softmax(-1) @ v64
    else:
        out = scaled_dot_product_attention(q64[None], k64[None], v64[None], sees, scale=scale)[0]
    # A score is a sum of head_dim products and up to four more roundings, tanh another eight of the cap; a probability
    # errs by as much relative to itself, and e^x by four; twice, for the sum divided by; then `length` of each summed.
    off = (head_dim + 4) * EPS * scale * (q64.abs() @ k64.abs().transpose(1, 2)).amax() + 8 * EPS * softcap
    bound = (4 * off + (2 * length + 16) * EPS) * v64.abs().amax()
    return out.transpose(0, 1).numpy(), np.full(q.shape, bound)


def check(text: Text, q: np.ndarray, first: int, chunks: list[tuple[int, int]] | None = None, **how: float) -> None:
    found = attended(text, q, first, chunks or [(0, len(q))], **how)
    expected, bound = exact(text, q, first, **how)
    assert (np.abs(found - expected) <= bound).all()


def queries(rows: int, heads: int, head_dim: int = 64, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(rows + heads)
    return (rng.standard_normal((rows, heads, head_dim)) * spread).astype(np.float32)


@each_target
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130, 700])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_one_row_over_everything_before(target, kind, length, group):
    text = Text.random(target, kind, length)
    check(text, queries(1, 2 * group), length - 1)


@each_target
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 72, 80, 96, 112, 128, 184, 256])
def test_any_head_dim(target, kind, head_dim):
    text = Text.random(target, kind, 150, head_dim=head_dim)
    check(text, queries(1, 2, head_dim), 149)
    check(text, queries(37, 6, head_dim), 113)


@each_target
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "rows"), [(0, 1), (0, 64), (0, 200), (60, 9), (63, 130), (190, 3)])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_many_rows_see_themselves_and_those_before(target, kind, first, rows, group):
    check(Text.random(target, kind, 200), queries(rows, 2 * group), first)


@each_target
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 100, 1000])
def test_a_window(target, kind, window):
    text = Text.random(target, kind, 300)
    check(text, queries(1, 8), 299, window=window)
    check(text, queries(170, 6), 130, window=window)


@each_target
@pytest.mark.parametrize("kind", KINDS)
def test_softcap_and_scale(target, kind):
    text = Text.random(target, kind, 100)
    check(text, queries(70, 4, spread=6.0), 30, softcap=20.0, scale=0.3)
    check(text, queries(1, 4, spread=6.0), 99, softcap=20.0, scale=0.3, window=50)


@each_target
@pytest.mark.parametrize(
    "chunks", [[(0, 1), (1, 130)], [(0, 64), (64, 128), (128, 130)], [(i, i + 1) for i in range(130)]]
)
def test_chunks_do_not_change_what_is_computed(target, chunks):
    check(Text.random(target, "f16", 140), queries(130, 8), 10, chunks)


@each_target
def test_scores_as_large_as_they_come(target):
    """A probability of one beside nothing: neither overflow nor a division by zero, wherever the largest score lies."""
    text = Text.random(target, "f16", 200)
    check(text, queries(1, 4, spread=300.0), 199)
    check(text, -queries(90, 4, spread=300.0), 110)


@each_target
@pytest.mark.parametrize("kind", KINDS)
def test_going_back_overwrites(target, kind):
    text = Text.random(target, kind, 150)
    fresh = Text.random(target, kind, 149)  # other numbers
    text.keys[70:140], text.values[70:140] = fresh.keys[70:140], fresh.values[70:140]
    text.store(70, 140)
    check(text, queries(20, 4), 120)


@each_target
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_copied(target, kind):
    text = Text.random(target, kind, 200, slots=3)
    source = text.slot
    text.cache.copy(source, 0, 131)
    text.slot = 0
    text.keys[131:], text.values[131:] = text.values[131:].copy(), text.keys[131:].copy()
    text.store(131, 200)
    check(text, queries(100, 4), 100)
    text.slot = source
    text.keys[131:], text.values[131:] = text.values[131:].copy(), text.keys[131:].copy()
    check(text, queries(100, 4), 100)  # the source is what it was


@each_target
@pytest.mark.parametrize("kind", LEVELS)
def test_rows_of_zeros_are_kept(target, kind):
    text = Text.random(target, kind, 70)
    text.keys[33], text.values[33] = 0, 0
    text.store(33, 34)
    out = attended(text, queries(1, 2), 69, [(0, 1)])
    text.keys[33, :, 0] = text.values[33, :, 0] = 1e-30  # as good as zero, and a scale that can be divided by
    assert (np.abs(out - exact(text, queries(1, 2), 69)[0]) <= exact(text, queries(1, 2), 69)[1]).all()


@each_target
def test_what_is_not_a_number_shows(target):
    text = Text.random(target, "f16", 70)
    q = queries(2, 2)
    q[1, 0, 0] = np.nan
    out = attended(text, q, 68, [(0, 2)])
    assert np.isnan(out[1, 0]).all()
    assert np.isfinite(out[0]).all()
    assert np.isfinite(out[1, 1]).all()


@pytest.mark.parametrize(("kind", "nbytes"), [("f16", 4), ("int8", 2 + 8 / 64), ("int4", 1 + 8 / 64)])
def test_bytes_of_a_number_of_keys_and_values(kind, nbytes):
    assert ops.KeyValues(kind, 3, 2, 100, 4, 64).nbytes == 3 * 2 * 128 * 4 * 64 * nbytes


def test_refusals():
    with pytest.raises(MemoryError, match="1024000000000000 bytes were asked for"):
        ops.KeyValues("f16", 2, 2, 1_000_000_000, 1000, 64)
    with pytest.raises(MemoryError, match="bytes were asked for"):
        ops.KeyValues("f16", 1 << 30, 1 << 30, 1_000_000_000, 1 << 20, 256)  # more than can be counted
    for head_dim in (0, 12, 264):
        with pytest.raises(ValueError, match="multiple of 8 up to 256"):
            ops.KeyValues("f16", 1, 1, 64, 1, head_dim)
