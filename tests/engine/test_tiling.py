"""Weights into tiles: decoded again they are what the format itself says, for every format there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.engine import tiling
from fewbits.engine.tiling import levels_by_code, narrowest, tiled
from fewbits.errors import FormatError
from fewbits.formats import FORMATS, Affine, Float, Format, QTensor
from fewbits.formats.codebook import Codebook
from fewbits.runtime.tiles import Direct, Floats, Stepped, Tiles, Zeros, decode

SHAPES = ((5, 40), (16, 272), (37, 256), (33, 512))
"""Rows that are no whole panels, columns that are no whole blocks and no whole groups."""
TABLE_ERROR = 0.0039
"""Of the scale: what rounding NF4's or FP4's levels to the best grid within a byte moves one by, at most."""


def quantized(format: Format, shape: tuple[int, int], *, search: bool = False) -> QTensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.01
    params = format.fit(w, search=search)
    return QTensor(format, format.round(w, params), params)


def fits(format: Format, shape: tuple[int, int]) -> bool:
    try:
        format.check(shape)
    except FormatError:
        return False
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_tiles_are_the_formats_own_numbers(name):
    """Bit for bit: tiles multiply and add what the format's decoder does, in its order; factors of levels are powers
    of two. Only levels of tables are rounded, and LLM.int8's decoder rounds twice where tiles have one scale.
    """
    for shape in SHAPES:
        if not fits(FORMATS[name], shape):
            continue
        weight = quantized(FORMATS[name], shape)
        found, expected = decode(tiled(weight)), weight.dequantize().numpy()
        if isinstance(weight.format, Codebook):
            scale = weight.params["scale"].repeat_interleave(weight.format.group, 1)[:, : shape[1]].numpy()
            assert (np.abs(found - expected) <= TABLE_ERROR * scale).all()
            assert not np.array_equal(found, expected)
        elif name == "llm-int8":
            np.testing.assert_allclose(found, expected, rtol=2**-22)
        else:
            assert np.array_equal(found, expected), shape


@pytest.mark.parametrize("name", ["int4-g32", "int2", "q4_0", "q6_k", "iq4_xs", "q4_1", "int3-asym-g64"])
def test_searched_scales_may_be_negative(name):
    weight = quantized(FORMATS[name], (33, 256), search=True)
    assert np.array_equal(decode(tiled(weight)), weight.dequantize().numpy())


@pytest.mark.parametrize(
    ("name", "bits", "zero", "scale", "offset"),
    [
        ("q4_0", 4, 8, Direct, type(None)),
        ("q8_0", 8, 128, Direct, type(None)),
        ("q4_1", 4, 0, Direct, Direct),
        ("q4_k", 4, 0, Stepped, Stepped),
        ("q6_k", 6, 32, Stepped, type(None)),
        ("int4-asym-g32", 4, 0, Direct, Zeros),
        ("int8-asym", 8, 0, Direct, Zeros),
        ("ternary", 2, 1, Direct, type(None)),
        ("mxfp4", 4, 12, Direct, type(None)),
        ("iq4_nl", 4, 127, Direct, type(None)),
        ("binary-g64", 1, 1, Direct, type(None)),
    ],
)
def test_each_kind_of_params_keeps_its_kind(name, bits, zero, scale, offset):
    tile = tiled(quantized(FORMATS[name], (33, 256)))
    assert isinstance(tile, Tiles)
    assert (tile.bits, tile.zero, type(tile.scale), type(tile.offset)) == (bits, zero, scale, offset)


def test_bytes_are_the_formats_where_nothing_is_filled_up():
    """Q4_K's 12 bytes of 6-bit scales and minima take 16 here: 0.125 bits a weight more; the others nothing."""
    for name, more in {"q4_0": 0, "q8_0": 0, "q6_k": 0, "iq4_xs": 2 / 256, "q4_k": 4 / 256, "int4-asym-g32": 0}.items():
        weight = quantized(FORMATS[name], (32, 512))
        assert tiled(weight).nbytes == weight.nbytes + more * 32 * 512, name


def test_floats_stay_what_they_are():
    for name, kind in {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}.items():
        tile = tiled(quantized(FORMATS[name], (5, 40)))
        assert isinstance(tile, Floats)
        assert (tile.kind, tile.scale) == (kind, None)
    eighths = tiled(quantized(FORMATS["fp8-e4m3"], (5, 40)))
    assert isinstance(eighths, Floats)
    assert eighths.kind == "f16"
    assert tiled(quantized(Float(torch.float64), (5, 40))).kind == "f32"


def test_groups_that_no_kernel_takes_are_decoded():
    weight = quantized(Affine(bits=4, group=24), (17, 96))
    tile = tiled(weight)
    assert isinstance(tile, Floats)
    assert np.array_equal(decode(tile), weight.dequantize().numpy())


def test_slabs_make_the_same_tiles_as_one(monkeypatch):
    weight = quantized(FORMATS["q5_k"], (70, 512))
    whole = tiled(weight)
    monkeypatch.setattr(tiling, "SLAB", 512 * 16)
    parts = tiled(weight)
    assert isinstance(whole, Tiles)
    assert isinstance(parts, Tiles)
    assert np.array_equal(whole.codes, parts.codes)
    assert np.array_equal(decode(whole), decode(parts))


def test_levels_of_codes_are_those_of_the_format():
    for name, format in FORMATS.items():
        if isinstance(format, Float):
            continue
        listed = levels_by_code(format)
        assert listed is not None, name
        levels = listed[1][listed[1].isfinite()]
        assert torch.equal(levels.unique(), format.levels), name


def test_the_narrowest_type_that_is_exact():
    assert narrowest(np.array([0.5, 3.0], np.float32)).dtype == np.float16
    assert narrowest(np.array([2.0**100], np.float32)).dtype == np.uint16  # as bfloat16
    assert narrowest(np.array([1 + 2.0**-20], np.float32)).dtype == np.float32
