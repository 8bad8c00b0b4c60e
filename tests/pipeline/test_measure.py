"""What is measured behind matrices that are quantized already."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.func import functional_call

from fewbits.formats import format_named
from fewbits.methods import quantize_tensor
from fewbits.methods.block import Block
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._measure import in_order_of_use, measure, put_behind

WIDTH, WINDOWS, LENGTH = 32, 6, 5


def kept(states: torch.Tensor) -> Activations:
    stream = Activations(*states.shape)
    stream.put(0, states)
    return stream


def make() -> tuple[Block, SimpleNamespace, torch.Tensor, torch.Tensor]:
    """Two matrices behind each other, the two streams in front of them, and what these hold."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH, bias=False)
    ).requires_grad_(False)
    x, original = torch.randn(2, WINDOWS, LENGTH, WIDTH)
    streams = SimpleNamespace(
        quantized=kept(x), original=kept(original), batch=2, ids=torch.zeros(WINDOWS, LENGTH, dtype=torch.int64)
    )
    block = Block.of(dict(module.named_parameters()))
    block = Block(**{**vars(block), "call": lambda x, p: functional_call(module, dict(p), (x,))})
    return block, streams, x.reshape(-1, WIDTH).double(), original.reshape(-1, WIDTH).double()


def part(block: Block, name: str) -> Block:
    return Block(**{**vars(block), "slots": {name: block.slots[name]}})


def test_matrices_come_in_the_order_of_their_use() -> None:
    block, streams, *_ = make()
    turned = Block(**{**vars(block), "slots": dict(reversed(block.slots.items()))})
    assert in_order_of_use(turned, streams) == [("0.weight",), ("2.weight",)]


def test_the_second_matrix_is_measured_behind_the_first() -> None:
    block, streams, x, original = make()
    first, second = (block.matrix(name).double() for name in block.slots)
    found = measure(part(block, "0.weight"), ("hessian", "drift"), streams, {}, last=False)["0.weight"]
    assert torch.allclose(found["hessian"].double(), x.T @ x / len(x), atol=1e-5)
    assert torch.allclose(found["drift"].double(), first @ (original - x).T @ x / len(x), atol=1e-5)
    assert torch.equal(streams.original.span(0, WINDOWS).reshape(-1, WIDTH).double(), original)  # not moved yet

    q = quantize_tensor(block.matrix("0.weight"), format_named("int2-g32"))
    behind: dict[str, torch.Tensor] = {}
    put_behind(behind, block, {"0.weight": q}, torch.float32)
    found = measure(part(block, "2.weight"), ("hessian", "drift"), streams, behind)["2.weight"]
    reads, read = (x @ q.dequantize().double().T).relu(), (original @ first.T).relu()
    assert torch.allclose(found["hessian"].double(), reads.T @ reads / len(x), atol=1e-5)
    assert torch.allclose(found["drift"].double(), second @ (read - reads).T @ reads / len(x), atol=1e-5)
    moved = streams.original.span(0, WINDOWS).reshape(-1, WIDTH).double()
    assert torch.allclose(moved, read @ second.T, atol=1e-5)
    assert torch.equal(block.matrix("0.weight").double(), first)
