"""Tuning: gradients are those of the whole model, held-out divergence never rises, files can hold what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from format_checks import same
from torch import Tensor
from training import HIDDEN, draw, mlp

from fewbits.errors import UnsupportedError
from fewbits.formats import QTensor, format_named
from fewbits.methods import METHODS
from fewbits.methods.base import Finished, Quantized
from fewbits.methods.rtn import RoundToNearest
from fewbits.methods.tune import Student, Tune

HEAD = 0.1 * draw(48, HIDDEN, seed=20)
QUICK = Tune(steps=20, batch=3, rate=2e-3, norm_rate=2e-3, held_out=0.25)


def model(format: str, windows: int = 16, dtype: torch.dtype = torch.float16) -> Quantized:
    """Two blocks rounded to nearest, under a head that tells 48 tokens apart."""
    blocks = [mlp(windows, 64, seed=seed) for seed in (0, 10)]
    inputs = torch.stack(list(blocks[0].inputs))
    for block in blocks:
        block.parameters["norm"].copy_(block.parameters["norm"].to(dtype))
    targets = blocks[1].run(blocks[0].run(inputs))
    plan = dict.fromkeys(blocks[0].slots, format_named(format))
    tensors = [RoundToNearest().quantize_block(block, plan, {}) for block in blocks]
    free = [{"norm": dtype} for _ in blocks]
    return Quantized(blocks, tensors, free, list(inputs), list(targets), lambda x: x @ HEAD.T, lambda x: x @ HEAD.T)


def divergence(model: Quantized, windows: list[int], numbers: list[dict[str, Tensor]], norms: list[Tensor]) -> Tensor:
    """Mean divergence with these matrices and norms, straight through the whole model."""
    x, target = (torch.stack([kept[i] for i in windows]) for kept in (model.inputs, model.targets))
    for block, matrices, norm in zip(model.blocks, numbers, norms, strict=True):
        x = block.call(x, block._replaced(matrices) | {"norm": norm})  # type: ignore[misc]
    p, q = (model.logits(states).double().log_softmax(-1) for states in (target, x))
    return (p.exp() * (p - q)).sum(-1).mean()


def decoded(tensors: Mapping[str, QTensor]) -> dict[str, Tensor]:
    return {name: q.dequantize() for name, q in tensors.items()}


def of_finished(model: Quantized, found: Finished, windows: list[int]) -> float:
    norms = [changed["norm"].float() for changed in found.changed]
    return float(divergence(model, windows, [decoded(t) for t in found.tensors], norms))


def test_gradients_are_those_of_the_whole_model() -> None:
    """Against torch's own differentiation of scales and norms as factors (int6: multiplied in float32)."""
    given = model("int6-g32")
    student = Student(given, norms=True, scales=True)
    student.differentiate([1, 4])
    factors = [
        {name: torch.ones_like(q.params["scale"]).requires_grad_() for name, q in t.items()} for t in given.tensors
    ]
    norms = [block.parameters["norm"].clone().requires_grad_() for block in given.blocks]
    numbers = [
        {name: (q.dequantize().unflatten(-1, (-1, 32)) * f[name].unsqueeze(-1)).flatten(-2) for name, q in t.items()}
        for t, f in zip(given.tensors, factors, strict=True)
    ]
    divergence(given, [1, 4], numbers, norms).backward()
    wanted = [f.grad for part in factors for f in part.values()]
    for change, expected in zip(student.scales, wanted, strict=True):
        assert expected is not None
        assert change.grad is not None
        assert float((change.grad - expected).abs().max()) < 1e-4 * float(expected.abs().max())  # float32 sums
    for change, norm in zip(student.norms, norms, strict=True):
        assert norm.grad is not None
        assert change.grad is not None
        expected = norm.grad * norm.detach().square().mean().sqrt()
        assert float((change.grad - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["int4-g32", "int3-g32-bf16", "int2-asym-g32", "nf4", "q4_1", "ternary-g64"])
def test_held_out_divergence_falls_and_codes_stay(name: str) -> None:
    given = model(name, dtype=torch.bfloat16)
    found = QUICK.finish(given)
    assert found.after < found.before
    held = [0, 4, 8, 12]
    assert abs(of_finished(given, found, held) / found.after - 1) < 0.05  # BF16 products against float32 ones
    for before, after in zip(given.tensors, found.tensors, strict=True):
        for key, q in after.items():
            assert torch.equal(q.codes, before[key].codes)
            back = QTensor.from_arrays(q.format, q.pack(), q.shape)
            assert torch.equal(back.dequantize(), q.dequantize())
    assert all(changed["norm"].dtype == torch.bfloat16 for changed in found.changed)


def test_the_divergence_that_is_reported_is_the_one_of_what_is_returned() -> None:
    given = model("int6-g32")
    found = QUICK.finish(given)
    assert of_finished(given, found, [0, 4, 8, 12]) == pytest.approx(found.after, rel=1e-3)  # float32 logits


def test_training_that_does_harm_is_thrown_away() -> None:
    given = model("int3-g32")
    found = replace(QUICK, rate=3.0, norm_rate=3.0).finish(given)
    assert found.after == found.before
    for before, after in zip(given.tensors, found.tensors, strict=True):
        assert all(same(q.params, before[key].params) for key, q in after.items())
    for block, changed in zip(given.blocks, found.changed, strict=True):
        assert torch.equal(changed["norm"].float(), block.parameters["norm"])


def test_where_scales_cannot_move_the_norms_do() -> None:
    given = model("mxfp4")
    found = QUICK.finish(given)
    assert found.after < found.before
    assert all(same(q.params, given.tensors[0][key].params) for key, q in found.tensors[0].items())
    with pytest.raises(UnsupportedError, match="no scale of this model can be moved"):
        replace(QUICK, norm_rate=0.0).finish(given)


def test_norms_may_be_left_alone() -> None:
    given = model("int3-g32")
    found = replace(QUICK, norm_rate=0.0).finish(given)
    assert found.after < found.before
    assert [dict(changed) for changed in found.changed] == [{}, {}]


def test_matrices_need_no_memory_and_some_may_be_in_floating_point() -> None:
    """Parameters without data give the same; a matrix that is kept in 16 bits takes part and stays."""
    given = model("int3-g32")
    kept = [
        {**t, "up": RoundToNearest().quantize(b.matrix("up"), format_named("bf16"), {})}
        for t, b in zip(given.tensors, given.blocks, strict=True)
    ]
    given = replace(given, tensors=kept)
    empty = [
        replace(b, parameters={n: p if n == "norm" else p.to("meta") for n, p in b.parameters.items()})
        for b in given.blocks
    ]
    found, other = QUICK.finish(given), QUICK.finish(replace(given, blocks=empty))
    assert found.after == other.after < found.before
    assert found.tensors[0]["up"] is kept[0]["up"]


def test_the_same_twice() -> None:
    first, second = QUICK.finish(model("int2-g32")), QUICK.finish(model("int2-g32"))
    assert first.after == second.after
    assert all(same(q.params, second.tensors[1][key].params) for key, q in first.tensors[1].items())


def test_some_text_must_be_held_out() -> None:
    with pytest.raises(UnsupportedError, match="1 window is too few"):
        QUICK.finish(model("int3-g32", windows=1))
    assert QUICK.finish(model("int3-g32", windows=2)).before > 0


def test_it_is_registered() -> None:
    assert isinstance(METHODS["tune"], Tune)
    assert METHODS["tune"].calibrated
