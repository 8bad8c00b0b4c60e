"""Decoding into a buffer, compiled and not, against the numbers of the format, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fewbits.formats import FORMATS, QTensor, format_named
from fewbits.kernels import Packed, _compiled
from fewbits.kernels.decode import decoder, reference

NAMES = [
    *(f"int{bits}{kind}{group}" for bits in (8, 6, 5, 4, 3, 2) for kind in ("", "-asym") for group in ("", "-g32")),
    *("int4-g16", "int4-g128", "int4-g32-bf16", "int4-tensor", "int8-asym-tensor", "nf4", "nf4-dq", "mxfp4", "nvfp4"),
    *("fp8-e4m3", "fp8-e4m3-tensor", "fp8-e5m2", "binary", "binary-g64", "binary-tensor"),
]
OTHERS = ["ternary-g64", "q4_0", "q4_k", "bf16"]
"""Formats without a lookup."""
SHAPES = [(1, 1), (3, 7), (5, 8), (4, 33), (9, 255), (70, 300), (2, 1030)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def core():
    found = _compiled.compiled()
    if found is None:
        pytest.skip("fewbits was built without a compiler")
    return found


def quantized(name: str, n: int, k: int) -> QTensor:
    """Rows of very different sizes, one of zeros among them."""
    format = format_named(name)
    generator = torch.Generator().manual_seed(n * k)
    w = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    w[n // 2] = 0 if n > 1 else w[0]
    params = format.fit(w)
    return QTensor(format, format.round(w, params), params)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_formats(core, name, shape):
    weight = quantized(name, *shape)
    packed, expected = Packed.of(weight), weight.dequantize()
    assert packed.format.lookup(packed.arrays, shape) is not None
    for dtype in DTYPES:
        found = packed.rows(slice(0, shape[0]), dtype)
        assert torch.equal(bits(found), bits(expected.to(dtype)))


def bits(x: torch.Tensor) -> torch.Tensor:
    """So that −0 is not 0."""
    return x.view({2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int3-g32", "int8-asym-tensor", "nvfp4", *OTHERS])
@pytest.mark.parametrize("make", [decoder, reference])
def test_some_rows_of_it(name, make):
    weight = quantized(name, 20, 256)
    indices = torch.tensor([19, 0, 7, 7])
    for rows in (slice(3, 11), indices):
        for dtype in DTYPES:
            expected = weight.dequantize()[rows].to(dtype)
            found = torch.full_like(expected, torch.nan)
            make(Packed.of(weight))(rows, found)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_formats_of_another_kind_say_so(name):
    packed = Packed.of(quantized(name, 4, 256))
    assert packed.format.lookup(packed.arrays, (4, 256)) is None


def test_it_is_compiled_code_that_decodes(core, monkeypatch):
    weight = Packed.of(quantized("nf4-dq", 4, 64))
    monkeypatch.setattr(type(weight.format), "decode", lambda *_: pytest.fail("the reference ran"))
    weight.rows(slice(0, 4), torch.bfloat16)


def test_every_code_has_its_level(core):
    """All 256 bytes of FP8 and all pairs of nibbles, at scale one; a NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, -1)
    one = torch.ones(1, 1)
    for name, count in (("fp8-e4m3", 256), ("fp8-e5m2", 256), ("mxfp4", 512)):
        array, scale = ("packed", torch.full((1, 16), 127, dtype=torch.uint8)) if name == "mxfp4" else ("weight", one)
        data = codes if name == "mxfp4" else codes.view(FORMATS[name].dtype)
        packed = Packed(FORMATS[name], (1, count), {array: data, "scale": scale})
        for dtype in DTYPES[:2]:
            expected = packed.unpack().dequantize().to(dtype)
            found = packed.rows(slice(0, 1), dtype)
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(bits(found.nan_to_num()), bits(expected.nan_to_num()))


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even(core):
    """Levels with a 1 in each of the bits that are cut, up to overflow and down to subnormals."""
    halves = torch.tensor([0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x7F7FFFFF, 0x00008001, 0x80018000 - 2**32])
    levels = torch.cat([halves, torch.zeros(9, dtype=torch.int64)]).to(torch.int32).view(torch.float32)
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x06]], dtype=torch.uint8)
    out = torch.zeros(1, 7, dtype=torch.bfloat16)
    core.decode_bfloat16(codes, 4, levels, torch.ones(1, 1), None, 7, out.view(torch.uint16), 1)
    expected = torch.tensor([0x3F80, 0x3F80, 0x3F81, 0x3F82, 0x7F80, 0x0001, 0x8002 - 2**16], dtype=torch.int16)
    assert torch.equal(bits(out)[0], expected)
    assert torch.equal(bits(levels[:7].bfloat16()), expected)


def test_threads_do_not_change_a_bit(core):
    lookup = FORMATS["nf4"].lookup(quantized("nf4", 300, 200).pack(), (300, 200))
    assert lookup is not None
    found = []
    for threads in (1, 5):
        found.append(torch.zeros(300, 200))
        core.decode_float32(lookup.codes, 4, lookup.levels, lookup.scale, None, lookup.group, found[-1], threads)
    assert torch.equal(found[0], found[1])


def test_what_does_not_fit_is_refused(core):
    codes, levels, scale, out = (
        torch.zeros(2, 4, dtype=torch.uint8),
        torch.zeros(16),
        torch.ones(2, 1),
        torch.zeros(2, 8),
    )
    core.decode_float32(codes, 4, levels, scale, None, 8, out, 1)
    for wrong, words in (
        ((codes, 9, levels, scale, None, 8, out, 1), "bits"),
        ((codes[:, :3].contiguous(), 4, levels, scale, None, 8, out, 1), "codes"),
        ((codes[:1], 4, levels, scale, None, 8, out, 1), "codes"),
        ((codes, 4, levels[:15], scale, None, 8, out, 1), "levels"),
        ((codes, 4, levels, torch.ones(3, 1), None, 8, out, 1), "scale"),
        ((codes, 4, levels, scale, None, 7, out, 1), "scale"),
        ((codes, 4, levels, scale, None, 0, out, 1), "scale"),
        ((codes, 4, levels, scale, torch.ones(1, 1), 8, out, 1), "zero"),
    ):
        with pytest.raises(ValueError, match=words):
            core.decode_float32(*wrong)
