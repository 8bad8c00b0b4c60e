"""Norms, gates, caps and rotations of every target that this machine runs, against torch and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

ops = pytest.importorskip("fewbits.runtime._runtime_ops", reason="the kernels were not compiled")

EPS = 2.0**-24  # half a unit in the last place of float32
WIDTHS = [1, 7, 16, 64, 100, 257, 2048]
each_target = pytest.mark.parametrize("target", ops.targets())


def numbers(width: int, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed + width).standard_normal(width) * spread).astype(np.float32)


def double(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).double()


@each_target
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_norm(target, width, accumulate):
    x, weight, before = numbers(width, 30.0), numbers(width, seed=1), numbers(width, seed=2)
    out = before.copy()
    ops.norm(target, x, weight, 1e-5, out, accumulate)
    exact = functional.rms_norm(double(x), (width,), double(weight), 1e-5).numpy()
    # Squares summed in 64 parts or fewer, halved by the root; then a division, a root and two products, and a sum.
    bound = (width / 2 + 8) * EPS * np.abs(exact) + accumulate * EPS * (np.abs(before) + np.abs(exact))
    assert (np.abs(out - exact - accumulate * before.astype(float)) <= bound).all()


@each_target
def test_norm_in_place(target):
    x, weight = numbers(100), numbers(100, seed=1)
    out = np.empty_like(x)
    ops.norm(target, x, weight, 1e-6, out, False)
    ops.norm(target, x, weight, 1e-6, x, False)
    assert np.array_equal(x, out)


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@each_target
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate(target, width, activation):
    gate, up = numbers(width, 4.0), numbers(width, seed=1)
    out = np.empty_like(gate)
    ops.gate(target, gate, up, activation, out)
    exact = ACTIVATIONS[activation](double(gate)).numpy() * up
    # e^x and a handful of roundings, of numbers up to the gate; gelu's polynomial is 4e-7 away from erfc besides.
    assert (np.abs(out - exact) <= (16 * EPS + 4e-7 * (activation == "gelu")) * np.abs(gate * up)).all()


@each_target
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero_are_open_or_shut(target, activation):
    gate = np.array([-1e30, -200.0, -100.0, -0.0, 0.0, 100.0, 1e12, np.nan], np.float32)
    out = np.empty_like(gate)
    ops.gate(target, gate, np.ones_like(gate), activation, out)
    np.testing.assert_array_equal(out, [0, 0, 0, 0, 0, 100, np.float32(1e12), np.nan])


@each_target
@pytest.mark.parametrize("width", WIDTHS)
def test_softcap(target, width):
    x = numbers(width, 60.0)
    capped = x.copy()
    ops.softcap(target, capped, 30.0)
    exact = 30.0 * torch.tanh(double(x) / 30.0).numpy()
    assert (np.abs(capped - exact) <= 8 * EPS * np.abs(exact)).all()  # tanh: 2 units; the quotient and the product


@each_target
@pytest.mark.parametrize("width", WIDTHS)
def test_add(target, width):
    x, out = numbers(width), numbers(width, seed=1)
    exact = out + -1.7 * x.astype(float)
    ops.add(target, x, -1.7, out)
    assert (np.abs(out - exact) <= 3 * EPS * (np.abs(exact) + 1.7 * np.abs(x))).all()


@each_target
@pytest.mark.parametrize(("head_dim", "part"), [(64, 1.0), (128, 1.0), (8, 1.0), (80, 0.4), (96, 0.75)])
def test_rotation_is_that_of_transformers(target, head_dim, part):
    heads, kv_heads, rows = 6, 2, 5
    config = LlamaConfig(
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        head_dim=round(head_dim * part) // 2 * 2,
    )
    rotary = LlamaRotaryEmbedding(config)
    frequencies = rotary.inv_freq.numpy()
    rotated = 2 * len(frequencies)
    positions = np.array([0, 1, 7, 300, 4095], np.int32)
    q = numbers(rows * heads * head_dim).reshape(rows, -1)
    k = numbers(rows * kv_heads * head_dim, seed=1).reshape(rows, -1)
    cosines, sines = np.empty((2, rows, len(frequencies)), np.float32)
    for row, position in enumerate(positions):
        ops.angles(frequencies, 1.0, int(position), cosines[row], sines[row])
    by_head = [torch.from_numpy(x.reshape(1, rows, -1, head_dim)).transpose(1, 2) for x in (q, k)]
    cos, sin = rotary(by_head[0], torch.from_numpy(positions.astype(np.int64))[None])
    turned = apply_rotary_pos_emb(*(x[..., :rotated].contiguous() for x in by_head), cos, sin)
    whole = [torch.cat((y, x[..., rotated:]), -1) for x, y in zip(by_head, turned, strict=True)]
    expected = [x.transpose(1, 2).reshape(rows, -1).numpy() for x in whole]
    cache = ops.KeyValues("f16", 1, 1, 4096, kv_heads, head_dim)
    slots = np.zeros(rows, np.int32)
    ops.prepare(target, q, k, k.copy(), cosines, sines, None, None, 0.0, cache, 0, slots, positions)
    for found, exact in zip((q, k), expected, strict=True):
        # Sines and cosines of both are off by less than 2 units; two products and their sum.
        np.testing.assert_allclose(found, exact, rtol=0, atol=8 * EPS * 2 * np.abs(exact).max())


@each_target
def test_heads_are_normed_one_by_one(target):
    rows, heads, kv_heads, head_dim = 3, 4, 2, 24
    q, k = (
        numbers(rows * heads * head_dim, 9.0).reshape(rows, -1),
        numbers(rows * kv_heads * head_dim).reshape(rows, -1),
    )
    q_norm, k_norm = numbers(head_dim, seed=1), numbers(head_dim, seed=2)
    expected = [
        functional.rms_norm(double(x).reshape(rows, -1, head_dim), (head_dim,), double(w), 1e-6).reshape(rows, -1)
        for x, w in ((q, q_norm), (k, k_norm))
    ]
    cosines, sines = np.ones((rows, head_dim // 2), np.float32), np.zeros((rows, head_dim // 2), np.float32)
    cache = ops.KeyValues("f16", 1, 1, 64, kv_heads, head_dim)
    slots, positions = np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32)
    ops.prepare(target, q, k, k.copy(), cosines, sines, q_norm, k_norm, 1e-6, cache, 0, slots, positions)
    for found, exact in zip((q, k), expected, strict=True):
        assert (np.abs(found - exact.numpy()) <= (head_dim / 2 + 8) * EPS * np.abs(exact.numpy())).all()
