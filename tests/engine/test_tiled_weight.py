"""Weights that go into tiles to run and come back for everything else: the same bytes, near the same products."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.engine.tiled_weight import TiledWeight
from fewbits.engine.tiling import multiplies_codes
from fewbits.formats import FORMATS, Float
from fewbits.kernels import LowRank
from fewbits.methods import quantize_tensor
from fewbits.nn import PackedWeight, QuantizedLinear
from fewbits.runtime.compiled import compiled

pytestmark = pytest.mark.skipif(compiled() is None, reason="the kernels were not compiled")
QUANTIZED = [name for name, format in FORMATS.items() if not isinstance(format, Float)]
ROUNDED = 1 / 254
"""The largest error of an input rounded to INT8, over the largest of its group."""


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(name: str, rows: int = 40, columns: int = 256) -> TiledWeight:
    q = quantize_tensor(0.02 * drawn(rows, columns), name, method="rtn-plain")
    return TiledWeight(q.format, q.shape, q.pack(), torch.float32).eval()


def arrays(store: PackedWeight) -> dict[str, torch.Tensor]:
    return {name: array.clone() for name, array in store.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_tiles(store: TiledWeight) -> bool:
    return store._matrix is not None


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_format_comes_back_bit_for_bit(name):
    store = weight(name)
    before, numbers = arrays(store), store.decode()
    with torch.no_grad():
        store.multiply(drawn(2, 256))
    assert in_tiles(store) is (multiplies_codes(store.format) and len(before) > 1)
    assert same(arrays(store), before)
    assert torch.equal(store.decode(), numbers)
    store.settle()
    assert not in_tiles(store)
    assert same({name: buffer for name, buffer in store.named_buffers() if name != "_like"}, before)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["int4-g32", "int3-asym-g64", "nf4", "nf4-dq", "ternary", "mlx4-g64", "int8", "binary-g64"]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 6).map(lambda n: 64 * n),
    count=st.integers(1, 9),
)
def test_products_keep_to_the_bound_of_rounded_inputs(name, rows, columns, count):
    """|Δy| ≤ Σ |w| · max|x| / 254 over groups of 128 columns, and what NF4's levels moved: 0.39 % of a scale."""
    store, x = weight(name, rows, columns), drawn(count, columns, seed=1)
    w = store.decode().double()
    with torch.no_grad():
        y = store.multiply(x)
    assert in_tiles(store)
    largest = torch.cat([g.abs().amax(-1, keepdim=True).expand(g.shape) for g in x.double().split(128, -1)], -1)
    bound = ROUNDED * largest @ w.abs().T
    if name.startswith("nf4"):
        scale = w.abs().reshape(rows, -1, 64).amax(-1).repeat_interleave(64, -1)  # a level is 1, one at least
        bound = bound + 0.0039 * 1.01 * x.abs().double() @ scale.T
    assert bool(((y - x.double() @ w.T).abs() <= 1.01 * bound + 1e-6).all())
    assert same(arrays(store), arrays(weight(name, rows, columns)))


def test_the_bytes_of_a_model_are_counted_in_tiles_too():
    store = weight("int4-g32", 64)
    size = sum(buffer.nbytes for buffer in store.buffers())
    with torch.no_grad():
        store.multiply(drawn(1, 256))
    assert sum(buffer.nbytes for buffer in store.buffers()) == size == 64 * 256 // 2 + 64 * 8 * 2


def test_training_takes_them_back():
    layer = QuantizedLinear(weight("int4-g32")).eval()
    x = drawn(3, 256)
    with torch.no_grad():
        layer(x)
    assert in_tiles(layer.store)
    layer.train()
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-6)
    assert not in_tiles(layer.store)


def test_gradients_go_through_packed_arrays():
    layer = QuantizedLinear(weight("nf4-dq")).eval()
    with torch.no_grad():
        layer(drawn(1, 256))
    x = drawn(3, 256).requires_grad_()
    layer(x).sum().backward()
    assert not in_tiles(layer.store)
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, 256), atol=1e-5)


def test_a_low_rank_lies_beside_tiles():
    store, x = weight("int8"), drawn(2, 5, 256)
    a, b = drawn(4, 256, seed=2), drawn(40, 4, seed=3)
    with torch.no_grad():
        with_it, without = store.multiply(x, None, LowRank(a, b, 0.5)), store.multiply(x)
    assert in_tiles(store)
    assert torch.allclose(with_it - without, 0.5 * x @ a.T @ b.T, atol=1e-3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
def test_copies(copied):
    store = weight("int4-g32")
    before = arrays(store)
    with torch.no_grad():
        store.multiply(drawn(1, 256))
        other = copied(store)
        assert same(arrays(other), before)
        assert torch.equal(other.multiply(drawn(1, 256)), store.multiply(drawn(1, 256)))


def test_another_type_and_other_numbers():
    store, other = (
        weight("int4-g32"),
        TiledWeight.of_packed(PackedWeight.of(quantize_tensor(drawn(40, 256), "int4-g32"))),
    )
    with torch.no_grad():
        store.multiply(drawn(1, 256))
    store.load_state_dict(other.state_dict())
    assert torch.equal(store.decode(), other.decode())
    with torch.no_grad():
        store.multiply(drawn(1, 256))
    assert store.to(torch.bfloat16).decode().dtype == torch.bfloat16
    assert not in_tiles(store)
    assert same(arrays(store), arrays(other))


def test_products_have_the_type_of_their_input():
    store = weight("int4-g32")
    with torch.no_grad():
        assert store.multiply(drawn(2, 256).bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert store.multiply(drawn(2, 256)).dtype == torch.bfloat16


def test_an_embedding_looks_its_rows_up_in_tiles():
    store = weight("int8")
    ids = torch.tensor([[3, 3], [0, 39]])
    with torch.no_grad():
        packed = store.look_up(ids)
        store.multiply(drawn(1, 256))
        assert in_tiles(store)
        assert torch.allclose(store.look_up(ids), packed, rtol=1e-6)
    assert torch.equal(packed, store.decode()[ids])
