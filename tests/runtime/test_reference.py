"""The references of the ops, against torch and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fewbits.errors import UnsupportedError
from fewbits.runtime.ops import (
    Add,
    Attend,
    Embed,
    Experts,
    Gate,
    Linear,
    Norm,
    Op,
    Program,
    Rotary,
    Select,
    Softcap,
)
from fewbits.runtime.reference import ACTIVATIONS, ReferenceRunner, attention, coded, norm, rotated, rounded
from fewbits.runtime.tiles import Direct, Floats, Tiles, decode

UNIT = 2.0**-24
"""Half the distance from 1 to the next float32."""
HEADS, KV_HEADS, SIZE = 4, 2, 8


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def floats(matrix: np.ndarray) -> Floats:
    """A matrix as it lies in panels."""
    rows, columns = matrix.shape
    filled = np.zeros((-(-rows // 16) * 16, -(-columns // 32) * 32), np.float32)
    filled[:rows, :columns] = matrix
    return Floats(rows, columns, "f32", filled.reshape(-1, 16, filled.shape[1]).transpose(0, 2, 1).copy())


def close(found: np.ndarray, expected: torch.Tensor, roundings: int) -> None:
    """Within so many float32 roundings of the largest number."""
    assert np.abs(found - expected.numpy()).max() <= roundings * UNIT * float(expected.abs().max())


def test_norm_is_torchs():
    x, weight = normal(5, 48), normal(48, seed=1)
    close(norm(x, weight, 1e-3), functional.rms_norm(torch.tensor(x), (48,), torch.tensor(weight), 1e-3), 16)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("silu", functional.silu),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
    ],
)
def test_activations_are_torchs(name, theirs):
    x = np.concatenate([4 * normal(1000), np.float32([0, -1e4, 1e4])])
    # An absolute bound: far on the negative side 1 + erf cancels, to a rounding of 1 times x.
    assert np.abs(ACTIVATIONS[name](x) - theirs(torch.tensor(x)).numpy())[:1000].max() <= 16 * UNIT * 16
    assert np.abs(ACTIVATIONS[name](x)[1000:] - np.float32([0, 0, 1e4])).max() <= UNIT


def test_rotation_is_transformers():
    positions = numbers(0, 1, 7, 90)
    x, frequencies = normal(4, 3, SIZE), (0.5 ** np.arange(SIZE // 2)).astype(np.float32)
    angles = torch.tensor(positions)[:, None].float() * torch.tensor(frequencies)
    angles = torch.cat([angles, angles], dim=-1)[None]
    heads_first = torch.tensor(x).transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, angles.cos() * 1.25, angles.sin() * 1.25)
    close(rotated(x, positions, Rotary(frequencies, 1.25)), expected[0].transpose(0, 1), 8)


def test_a_part_of_a_head_is_rotated_and_none_where_there_are_no_angles():
    x = normal(2, 1, SIZE)
    part = rotated(x, numbers(3, 4), Rotary(np.float32([0.1, 0.2])))
    assert np.array_equal(part[..., 4:], x[..., 4:])
    assert not np.isclose(part[..., :4], x[..., :4]).any()
    assert np.array_equal(rotated(x, numbers(3, 4), Rotary(np.zeros(0, np.float32))), x)


def attend(**settings) -> Attend:
    rotary = Rotary(np.zeros(0, np.float32))
    return Attend("q", "k", "v", "a", 0, HEADS, KV_HEADS, SIZE, scale=0.3, rotary=rotary, **settings)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_is_torchs(window):
    """New tokens 4 to 8 over all nine."""
    q, k, v = normal(5, HEADS, SIZE), normal(9, KV_HEADS, SIZE, seed=1), normal(9, KV_HEADS, SIZE, seed=2)
    positions = np.arange(4, 9, dtype=np.int32)
    behind = torch.arange(4, 9)[:, None] - torch.arange(9)
    mask = (behind >= 0) & (behind < (window or 99))
    expected = functional.scaled_dot_product_attention(
        *(torch.tensor(x).transpose(0, 1) for x in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    close(attention(attend(window=window), q, k, v, positions), expected.transpose(0, 1).flatten(1), 32)


def test_scores_are_bounded():
    q, k, v = 9 * normal(2, HEADS, SIZE), normal(2, KV_HEADS, SIZE, seed=1), normal(2, KV_HEADS, SIZE, seed=2)
    found = attention(attend(softcap=2.0), q, k, v, numbers(0, 1))
    for head in range(HEADS):
        scores = 0.3 * torch.tensor(q[1, head]) @ torch.tensor(k[:, head // 2]).T
        expected = (2 * (scores / 2).tanh()).softmax(0) @ torch.tensor(v[:, head // 2])
        close(found[1, head * SIZE : (head + 1) * SIZE], expected, 32)


def test_inputs_are_rounded_by_group():
    """By hand: a group of 128, and one of one; 127 stands for the largest, and a tie goes to the even code."""
    x = np.float32([[127, 2.5, -3.5, *[0] * 125, 0.25]])
    assert rounded(x).tolist() == [[127, 2, -4, *[0] * 125, 0.25]]
    assert rounded(np.zeros((1, 4), np.float32)).tolist() == [[0, 0, 0, 0]]


def test_codes_are_off_by_half_a_step_at_most():
    x = normal(50, 16)
    for highest in (127, 7):
        step = np.abs(x).max(-1, keepdims=True) / highest
        error = np.abs(coded(x, highest) - x)
        assert (error <= step * (0.5 + 4 * highest * UNIT)).all()
        assert error.max() > step.max() * 0.4


def program(*ops: Op, width: int, embed: bool = True) -> Program:
    """Ops between an embedding in x, one-hot times a table, and logits."""
    table = floats(normal(20, width))
    return Program((Embed(table, "x", 2.0), *ops) if embed else ops, {"x": width}, width, 1, KV_HEADS, SIZE)


def run(made: Program, tokens: np.ndarray, wanted: np.ndarray | None = None, **settings) -> np.ndarray:
    runner = ReferenceRunner(made, 1, 32, **settings)
    rows = np.arange(len(tokens), dtype=np.int32)
    return runner.forward(tokens, np.zeros_like(tokens), rows, rows if wanted is None else wanted)


def test_a_program_of_every_other_op():
    """Embed, Norm, Linear with a bias, Gate, Add, Select, Softcap, in torch's words."""
    width, tokens = 32, numbers(3, 19, 0)
    gate, up, down, share = normal(48, 32), normal(48, 32, seed=1), normal(32, 48, seed=2), normal(1, 32, seed=3)
    bias, weight = normal(48, seed=4), normal(32, seed=5)
    made = program(
        Norm("x", weight, 1e-5, "h"),
        Linear("h", (floats(gate), floats(up)), ("g", "u"), (None, bias)),
        Gate("g", "u", "g", "gelu_tanh"),
        Linear("g", (floats(down),), ("t",), (None,)),
        Linear("h", (floats(share),), ("w",), (None,)),
        Add("t", "x", "w"),
        Add("h", "x"),
        Norm("t", weight, 1e-5, "x", accumulate=True),
        Linear("h", (floats(down[:, :32]),), ("x",), (None,), accumulate=True),
        Select("x", "logits"),
        Softcap("logits", 30.0),
        width=width,
    )
    g, u, d, s, b, w = (torch.tensor(array) for array in (gate, up, down, share, bias, weight))
    x = 2 * torch.tensor(normal(20, width))[tokens.tolist()]
    h = functional.rms_norm(x, (32,), w, 1e-5)
    t = (functional.gelu(h @ g.T, approximate="tanh") * (h @ u.T + b)) @ d.T
    x = x + (h @ s.T).sigmoid() * t + h + functional.rms_norm(t, (32,), w, 1e-5) + h @ d[:, :32].T
    close(run(made, tokens, numbers(2, 0)), 30 * (x[[2, 0]] / 30).tanh(), 100)


@pytest.mark.parametrize("normalise", [True, False])
def test_experts_are_a_loop_over_tokens(normalise):
    gates, ups, downs = normal(4, 24, 32), normal(4, 24, 32, seed=1), normal(4, 32, 24, seed=2)
    router = normal(4, 32, seed=3)
    made = program(
        Linear("x", (floats(router),), ("r",), (None,)),
        Experts("x", "r", "x", *(tuple(floats(m) for m in part) for part in (gates, ups, downs)), 2, normalise, "silu"),
        Select("x", "logits"),
        width=32,
    )
    tokens = numbers(*range(12))
    x = 2 * torch.tensor(normal(20, 32))[:12]
    expected = x.clone()
    for row, probabilities in enumerate((x @ torch.tensor(router).T).softmax(-1)):
        shares, chosen = probabilities.topk(2)
        shares = shares / shares.sum() if normalise else shares
        for share, expert in zip(shares, chosen.tolist(), strict=True):
            g, u, d = (torch.tensor(part[expert]) for part in (gates, ups, downs))
            expected[row] += share * (d @ (functional.silu(g @ x[row]) * (u @ x[row])))
    close(run(made, tokens), expected, 100)


def attending(**settings) -> Program:
    """Attention over embeddings, from one matrix each for queries, keys and values."""
    weights = tuple(floats(normal(n * SIZE, 32, seed=n)) for n in (HEADS, KV_HEADS, KV_HEADS))
    return program(
        Linear("x", weights, ("q", "k", "v"), (None,) * 3), attend(**settings), Select("a", "logits"), width=32
    )


def test_queries_and_keys_are_normed_by_head_before_they_are_rotated():
    q_norm, k_norm = normal(SIZE, seed=7), normal(SIZE, seed=8)
    made = attending(q_norm=q_norm, k_norm=k_norm, eps=1e-5)
    tokens = numbers(4, 5, 6)
    x = 2 * torch.tensor(normal(20, 32))[tokens.tolist()]
    q, k, v = (x @ torch.tensor(decode(weight)).T for weight in made.ops[1].weights)
    q = functional.rms_norm(q.unflatten(1, (HEADS, SIZE)), (SIZE,), torch.tensor(q_norm), 1e-5)
    k = functional.rms_norm(k.unflatten(1, (KV_HEADS, SIZE)), (SIZE,), torch.tensor(k_norm), 1e-5)
    v = v.unflatten(1, (KV_HEADS, SIZE))
    expected = functional.scaled_dot_product_attention(
        *(part.transpose(0, 1) for part in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    )
    close(run(made, tokens, kv="f32"), expected.transpose(0, 1).flatten(1), 200)


def test_two_sequences_in_one_call_do_not_see_each_other():
    made, a, b = attending(), numbers(1, 2, 3), numbers(9, 8)
    runner = ReferenceRunner(made, 2, 32)
    both = runner.forward(
        np.concatenate([b, a]), numbers(1, 1, 0, 0, 0), numbers(0, 1, 0, 1, 2), numbers(0, 1, 2, 3, 4)
    )
    assert np.array_equal(both, np.concatenate([run(made, b), run(made, a)]))


def test_going_back_overwrites_and_copies_are_their_own():
    made = attending()
    runner = ReferenceRunner(made, 2, 32)
    runner.forward(numbers(1, 2, 3), numbers(0, 0, 0), numbers(0, 1, 2), numbers(2))
    runner.copy(0, 1, 1)
    again = runner.forward(numbers(7, 7), numbers(0, 1), numbers(1, 1), numbers(0, 1))
    alone = run(made, numbers(1, 7), numbers(1))
    assert np.array_equal(again, np.concatenate([alone, alone]))


@pytest.mark.parametrize(("kv", "step"), [("f16", 2.0**-11), ("int8", 0.5 / 127), ("int4", 0.5 / 7)])
def test_keys_and_values_are_rounded_to_the_caches_type(kv, step):
    """One token attends to itself: what comes out is its value, as the cache holds it."""
    made = attending()
    exact, found = run(made, numbers(5), kv="f32"), run(made, numbers(5), kv=kv)
    error = np.abs(found - exact).reshape(HEADS, SIZE) / np.abs(exact).reshape(HEADS, SIZE).max(-1, keepdims=True)
    assert step / 8 < error.max() <= step * 1.001


def test_an_unknown_cache_is_refused():
    with pytest.raises(UnsupportedError, match="int3"):
        ReferenceRunner(attending(), 1, 8, "int3")


def test_products_with_tiles_round_their_inputs_unless_exact():
    packed = np.random.default_rng(0).integers(0, 256, (1, 8, 256), np.uint8)
    tile = Tiles(16, 256, 4, 16, 8, packed, Direct(normal(1, 16, 16)))
    made = program(Linear("x", (tile,), ("logits",), (None,)), width=256)
    x = 2 * torch.tensor(normal(20, 256))[[5]]
    w = torch.tensor(decode(tile))
    close(run(made, numbers(5), exact=True), x @ w.T, 100)
    halves = x.unflatten(1, (2, 128))
    scale = halves.abs().amax(-1, keepdim=True) / 127
    close(run(made, numbers(5)), ((halves / scale).round() * scale).flatten(1) @ w.T, 100)
    assert not np.array_equal(run(made, numbers(5)), run(made, numbers(5), exact=True))
