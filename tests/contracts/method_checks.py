"""What every method promises, as plain functions that take a method: `test_methods.py` runs them over the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from format_checks import same, squared_error, weights

from fewbits.errors import FormatError
from fewbits.formats import FORMATS, QTensor
from fewbits.formats.explain import family
from fewbits.methods import METHODS, Block, Method, TensorMethod, method_named

ONE_OF_EACH = list({type(format): format for format in FORMATS.values()}.values())
ONE_OF_EACH += [format for format in FORMATS.values() if family(format) == "int4" and format not in ONE_OF_EACH]


def quantized(method: Method, **weights_by_name: torch.Tensor) -> list[dict[str, QTensor]]:
    """The block in every format, one after the other."""
    return [
        method.quantize_block(Block.of(weights_by_name), dict.fromkeys(weights_by_name, format), {})
        for format in ONE_OF_EACH
    ]


def check_block(method: Method) -> None:
    """Every weight comes back under its name, in its format and shape, as codes that its bytes hold."""
    block = {"a": weights(5, 96), "b": weights(3, 64), "experts": weights(2, 4, 64)}
    for format, found in zip(ONE_OF_EACH, quantized(method, **block), strict=True):
        assert found.keys() == block.keys()
        for name, q in found.items():
            assert (q.format, q.shape) == (format, tuple(block[name].shape))
            back = QTensor.from_arrays(format, q.pack(), q.shape)
            assert torch.equal(back.dequantize(), q.dequantize())
            assert q.dequantize().isfinite().all()


def check_codes_resemble_weights(method: Method) -> None:
    """The error is less than that of storing zeros, in every format."""
    w = weights(16, 128)
    for format, found in zip(ONE_OF_EACH, quantized(method, w=w), strict=True):
        assert squared_error(found["w"], w) < float(w.double().square().sum()), format.name


def check_zeros(method: Method) -> None:
    assert not any(found["w"].dequantize().any() for found in quantized(method, w=torch.zeros(3, 64)))


def check_not_finite_is_refused(method: Method) -> None:
    for bad in (float("nan"), float("inf")):
        w = weights(3, 64)
        w[1, 2] = bad
        for format in ONE_OF_EACH:
            with pytest.raises(FormatError, match="1 of 192 weights are NaN or Inf"):
                method.quantize_block(Block.of({"w": w}), {"w": format}, {})


def check_input_is_not_changed_and_nothing_is_drawn_by_lot(method: Method) -> None:
    w = weights(4, 96)
    before = w.clone()
    first, second = quantized(method, w=w), quantized(method, w=w)
    assert torch.equal(w, before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["w"].codes, b["w"].codes)
        assert same(a["w"].params, b["w"].params)


def check_rows(method: Method) -> None:
    """A rowwise method gives the same in slabs, for formats that are rowwise too."""
    if not (isinstance(method, TensorMethod) and method.rowwise):
        return
    w = weights(7, 96)
    for format in ONE_OF_EACH:
        if format.rowwise:
            whole = method.quantize(w, format, {}).dequantize()
            slabs = [method.quantize(w[rows], format, {}).dequantize() for rows in (slice(0, 3), slice(3, 7))]
            assert torch.equal(whole, torch.cat(slabs))


def check_description(method: Method) -> None:
    assert method_named(method.name) is METHODS[method.name] is method
    assert method.summary
    assert isinstance(method.needs, tuple)


CHECKS: Mapping[str, Callable[[Method], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
