"""What every method promises, as plain functions that take a method: `test_methods.py` runs them over the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import pytest
import torch
from format_checks import same, squared_error, weights, width
from torch.nn.functional import linear

from fewbits.errors import FormatError
from fewbits.formats import FORMATS, Format, Grouped, QTensor
from fewbits.formats.explain import family
from fewbits.methods import METHODS, Block, Method, Solver, TensorMethod, method_named
from fewbits.stats import InputStatistics

ONE_OF_EACH = list({type(format): format for format in FORMATS.values()}.values())
ONE_OF_EACH += [format for format in FORMATS.values() if family(format) == "int4" and format not in ONE_OF_EACH]


def inputs(in_features: int) -> torch.Tensor:
    """Made-up inputs of a layer, [tokens, in_features], whose channels go together and differ in size."""
    spread = torch.logspace(-1, 1, in_features)
    return weights(4 * in_features, in_features, seed=1, spread=1) @ weights(in_features, in_features, seed=2) * spread


def statistics(method: Method, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the method needs to know of the inputs of a matrix [..., N, K]."""
    seen = InputStatistics(frozenset(method.needs))
    seen.add(inputs(w.shape[-1]))
    return {need: value.expand(*w.shape[:-2], *value.shape) for need, value in seen.values().items()}


def quick(method: Solver) -> Solver:
    """A method that goes on for a number of steps, with few of them."""
    return replace(method, steps=4) if "steps" in {f.name for f in fields(method)} else method


def runnable(matrices: Mapping[str, torch.Tensor]) -> Block:
    """A block whose matrices stand side by side: each reads as many channels of the input as it has columns."""

    def call(x: torch.Tensor, replaced: Mapping[str, torch.Tensor]) -> torch.Tensor:
        present = {**matrices, **replaced}.values()
        return torch.cat([linear(x[..., : w.shape[-1]], w.flatten(0, -2)) for w in present], dim=-1)

    windows = inputs(max(w.shape[-1] for w in matrices.values())).split(32)[:4]
    targets = [call(x, {}) for x in windows]
    return replace(Block.of(matrices), call=call, inputs=windows, targets=targets)


def solved(method: Solver, format: Format, block: Mapping[str, torch.Tensor]) -> dict[str, QTensor]:
    stats = {name: statistics(method, w) for name, w in block.items()}
    return quick(method).quantize_block(runnable(block), dict.fromkeys(block, format), stats)


def quantized(
    method: Solver, make: Callable[..., torch.Tensor] = weights, **shapes: tuple[int, ...]
) -> list[tuple[Format, dict[str, torch.Tensor], dict[str, QTensor]]]:
    """In one format of each kind, a block of matrices of these shapes, or a little wider: (format, block, solved)."""
    made = []
    for format in ONE_OF_EACH:
        block = {name: make(*shape[:-1], width(format, shape[-1])) for name, shape in shapes.items()}
        made.append((format, block, solved(method, format, block)))
    return made


def output_error(q: QTensor, w: torch.Tensor) -> float:
    """Mean squared error of the layer's outputs on `inputs`, summed over outputs: tr(E·H·Eᵀ)."""
    x = inputs(w.shape[-1]).double()
    return float((x @ (q.dequantize().double() - w.double()).mT).square().sum()) / len(x)


def check_block(method: Solver) -> None:
    """Every weight comes back under its name, in its format and shape, as codes that its bytes hold."""
    for format, block, found in quantized(method, a=(5, 96), b=(3, 64), experts=(2, 4, 64)):
        assert found.keys() == block.keys()
        for name, q in found.items():
            assert (q.format, q.shape) == (format, tuple(block[name].shape))
            back = QTensor.from_arrays(format, q.pack(), q.shape)
            assert torch.equal(back.dequantize(), q.dequantize())
            assert q.dequantize().isfinite().all()


def check_codes_resemble_weights(method: Solver) -> None:
    """The error is less than that of storing zeros, in every format: of the outputs where a method looks at these."""
    error = output_error if "hessian" in method.needs else squared_error
    for format, block, found in quantized(method, w=(16, 128)):
        w = block["w"]
        zeros = QTensor(FORMATS["fp32"], torch.zeros_like(w), {})
        assert error(found["w"], w) < error(zeros, w), format.name


def check_zeros(method: Solver) -> None:
    for _, _, found in quantized(method, torch.zeros, w=(3, 64)):
        assert not found["w"].dequantize().any()


def check_not_finite_is_refused(method: Solver) -> None:
    for bad in (float("nan"), float("inf")):
        for format in ONE_OF_EACH:
            w = weights(3, width(format, 64))
            w[1, 2] = bad
            with pytest.raises(FormatError, match=f"1 of {w.numel()} weights are NaN or Inf"):
                solved(method, format, {"w": w})


def check_input_is_not_changed_and_nothing_is_drawn_by_lot(method: Solver) -> None:
    first, second = quantized(method, w=(4, 96)), quantized(method, w=(4, 96))
    for (_, block, a), (_, _, b) in zip(first, second, strict=True):
        assert torch.equal(block["w"], weights(*block["w"].shape))
        assert torch.equal(a["w"].codes, b["w"].codes)
        assert same(a["w"].params, b["w"].params)


def check_rows(method: Method) -> None:
    """A rowwise method gives the same in slabs, for formats that are rowwise too."""
    if not (isinstance(method, TensorMethod) and method.rowwise):
        return
    for format in ONE_OF_EACH:
        if format.rowwise:
            w = weights(7, width(format, 96))
            stats = statistics(method, w)
            whole = method.quantize(w, format, stats).dequantize()
            slabs = [method.quantize(w[rows], format, stats).dequantize() for rows in (slice(0, 3), slice(3, 7))]
            assert torch.equal(whole, torch.cat(slabs))


def check_hessian_is_used(method: Method) -> None:
    """A method that knows the Hessian leaves less error in the outputs than rounding that knows its diagonal."""
    if not (isinstance(method, TensorMethod) and "hessian" in method.needs):
        return
    known = {}
    for columns in (128, 256):
        w = weights(12, columns)
        known[columns] = w, statistics(method, w)
    for format in FORMATS.values():
        if isinstance(format, Grouped) and format.columnwise:
            w, stats = known[width(format, 128)]
            importance = {"importance": stats["hessian"].diagonal()}
            rounded = METHODS["rtn"].quantize(w, format, importance)
            assert output_error(method.quantize(w, format, stats), w) < output_error(rounded, w), format.name


def check_description(method: Method) -> None:
    assert method_named(method.name) is METHODS[method.name] is method
    assert method.summary
    assert isinstance(method.needs, tuple)


CHECKS: Mapping[str, Callable[[Method], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
