"""Activation formats: against compressed-tensors' own rounding, and by hand."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

from fewbits.errors import FormatError
from fewbits.formats import ACTIVATIONS, FORMATS, activation_named

X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 5)[:, None]
NAMES = {"int8-token", "int8-tensor", "int8-static", "fp8-token", "fp8-tensor", "fp8-static"}


def arguments(format) -> QuantizationArgs:
    kind = "int" if format.element == "int8" else "float"
    strategy = "token" if format.scope == "token" else "tensor"
    return QuantizationArgs(num_bits=8, type=kind, strategy=strategy, dynamic=not format.static)


def test_the_registry_goes_by_name():
    assert ACTIVATIONS.keys() == NAMES
    assert all(activation_named(name).name == str(activation_named(name)) == name for name in NAMES)
    with pytest.raises(FormatError, match=r"'int4-token' is not known; choose one of int8-token"):
        activation_named("int4-token")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_codes_and_numbers_are_the_librarys_at_the_same_scale(name):
    """Static scales are half of what the range asks for, so that clipping is compared too."""
    format = ACTIVATIONS[name]
    scale = format.scale_of(X.abs().amax() / 2).reshape(1) if format.static else format.dynamic_scale(X)
    codes, used = format.quantize(X, scale)
    assert codes.dtype == format.dtype
    assert used is scale
    theirs = quantize(X, scale, None, arguments(format), dtype=format.dtype)
    assert torch.equal(codes.float(), theirs.float())
    numbers = dequantize(theirs, scale, None, arguments(format))
    assert torch.equal(format.dequantize(codes, scale), numbers)


@pytest.mark.parametrize("name", sorted(NAMES - {"int8-static", "fp8-static"}))
def test_dynamic_scales_put_the_largest_at_the_highest_code(name):
    format = ACTIVATIONS[name]
    codes, scale = format.quantize(X)
    dims = -1 if format.scope == "token" else (0, 1, 2)
    assert scale.shape == ((3, 5, 1) if format.scope == "token" else (1,))
    assert scale.dtype == torch.float32
    assert (codes.float().abs().amax(dims) == format.highest).all()
    step = scale if format.element == "int8" else torch.maximum(X.abs() / 8, scale * 2.0**-9)
    assert ((format.dequantize(codes, scale) - X).abs() <= step * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("element", ["int8", "fp8"])
def test_static_is_dynamic_where_the_range_is_the_same(element):
    dynamic, static = ACTIVATIONS[f"{element}-tensor"], ACTIVATIONS[f"{element}-static"]
    codes, scale = dynamic.quantize(X)
    again, used = static.quantize(X, scale)
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))
    assert used is scale
    with pytest.raises(FormatError, match="must be given"):
        static.quantize(X)


def test_codes_worked_out_by_hand():
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, 0.49], [0, 0, 0, 0, 0, 0, 0]])
    codes, scale = ACTIVATIONS["int8-token"].quantize(x)
    assert codes.tolist() == [[127, -127, 0, 2, 2, 0, 0], [0] * 7]  # ties to even
    assert scale[0].item() == 1.0
    codes, _ = ACTIVATIONS["int8-static"].quantize(x[:1] * 4, torch.ones(1))
    assert codes.tolist() == [[127, -128, 2, 6, 10, -2, 2]]
    codes, _ = ACTIVATIONS["fp8-static"].quantize(torch.tensor([1.0, 1.0625, 500.0, -1e9]), torch.ones(1))
    assert codes.float().tolist() == [1.0, 1.0, 448.0, -448.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8-token", "fp8-tensor"])
def test_sixteen_bit_inputs_are_rounded_in_float32(name, dtype):
    x = X.clamp(-6e4, 6e4).to(dtype)
    for found, expected in zip(ACTIVATIONS[name].quantize(x), ACTIVATIONS[name].quantize(x.float()), strict=True):
        assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("name", ["int8-token", "int8-tensor", "fp8-token", "fp8-tensor"])
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38])
def test_vanishing_inputs_give_finite_numbers(name, tiny):
    x = torch.full((2, 8), tiny)
    codes, scale = ACTIVATIONS[name].quantize(x)
    numbers = ACTIVATIONS[name].dequantize(codes, scale)
    assert ((numbers - x).abs() <= torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["int8-token", "int8-tensor", "fp8-token", "fp8-tensor"])
def test_numbers_that_are_none_stay_visible(name, bad):
    x = torch.ones(2, 8)
    x[1, 3] = bad
    codes, scale = ACTIVATIONS[name].quantize(x)
    assert not ACTIVATIONS[name].dequantize(codes, scale)[1].isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "weight", "message"),
    [
        ("int8-token", "int8", None),
        ("int8-static", "int8-asym-tensor", None),
        ("int8-token", "int4", None),
        ("int8-token", "ternary", None),
        ("int8-token", "ternary-tensor", None),
        ("int8-token", "ternary-g64", "one per group"),
        ("int8-token", "binary", "multiplied by integers, not binary"),
        ("fp8-token", "ternary", "multiplied by FP8 E4M3, not ternary"),
        ("fp8-token", "fp8-e4m3-tensor", None),
        ("int8-token", "int8-g32", "one per group"),
        ("int8-token", "fp8-e4m3", "multiplied by integers, not fp8-e4m3"),
        ("fp8-token", "int8", "multiplied by FP8 E4M3, not int8"),
        ("fp8-token", "fp8-e5m2", "not fp8-e5m2"),
        ("int8-token", "nf4", "not nf4"),
        ("int8-token", "fp16", "not fp16"),
    ],
)
def test_which_weights_they_are_multiplied_by(inputs, weight, message):
    trouble = ACTIVATIONS[inputs].weight_trouble(FORMATS[weight])
    assert trouble is None if message is None else message in trouble
