"""Bytes worked out by hand from the layouts that the modules describe, and the numbers of the textbook."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats import FORMATS, QTensor, format_named


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def packed(name: str, w: Tensor) -> dict[str, Tensor]:
    params = FORMATS[name].fit(w)
    return QTensor(FORMATS[name], FORMATS[name].round(w, params), params).pack()


def octets(x: Tensor) -> list[int]:
    return x.contiguous().view(torch.uint8).flatten().tolist()


def half(value: float) -> list[int]:
    return octets(torch.tensor([value], dtype=torch.float16))


def test_int8_of_the_textbook() -> None:
    """Range ±2, symmetric: scale 2/127; 0.74 becomes 47 and comes back as 0.7402."""
    params = FORMATS["int8"].fit(row(-2.0, 0.74, 2.0))
    codes = FORMATS["int8"].round(row(-2.0, 0.74, 2.0), params)
    assert params["scale"].item() == pytest.approx(2 / 127, rel=2**-24)
    assert codes.tolist() == [[-127, 47, 127]]
    assert FORMATS["int8"].decode(codes, params)[0, 1].item() == pytest.approx(0.7402, abs=5e-5)


def test_pi_as_float_and_as_integer() -> None:
    for_float = FORMATS["fp32"].round(torch.tensor([3.1415], dtype=torch.float64), {})
    assert 1e-9 < abs(for_float.double().item() - 3.1415) / 3.1415 < 6e-8
    params = {"scale": torch.ones(1, 1)}
    assert FORMATS["int8"].round(row(3.1415), params).item() == 3


def test_asymmetric_int8_of_the_textbook() -> None:
    """Range −1 … 3 in 255 steps: scale 4/255, zero-point round(1 / scale) = 64; −1 is 0, 0 is 64 and 3 is 255."""
    params = FORMATS["int8-asym"].fit(row(-1.0, 0.0, 3.0))
    assert params["scale"].item() == pytest.approx(4 / 255, rel=2**-23)
    assert params["zero"].item() == 64
    assert FORMATS["int8-asym"].round(row(-1.0, 0.0, 3.0), params).tolist() == [[0, 64, 255]]


@pytest.mark.parametrize(("weights", "bits", "gigabytes"), [
    (7e9, "fp32", 28), (7e9, "fp16", 14), (70e9, "fp16", 140),
])  # fmt: skip
def test_size_of_floats(weights: float, bits: str, gigabytes: float) -> None:
    assert FORMATS[bits].nbytes((int(weights) // 1000, 1000)) == gigabytes * 10**9


@pytest.mark.parametrize(("weights", "name", "gigabytes"), [(7e9, "int8", 7), (7e9, "int4", 3.5), (70e9, "int4", 35)])
def test_size_of_integers(weights: float, name: str, gigabytes: float) -> None:
    """Exactly the codes, and four bytes a row on top for its scale."""
    rows = int(weights) // 1000
    assert FORMATS[name].nbytes((rows, 1000)) == gigabytes * 10**9 + 4 * rows


def test_int4_row() -> None:
    """Scale 0.5; codes −7 … 7 lie as code + 8, the first in the low nibble."""
    arrays = packed("int4-g32", row(-3.5, -3.0, 0.0, 0.5, 3.5, 1.0))
    assert octets(arrays["packed"]) == [0x21, 0x98, 0xAF, 0x00]
    assert octets(arrays["scale"]) == half(0.5)


def test_int3_row() -> None:
    """Scale 1; codes −3 −2 −1 0 1 2 3 lie as 1 2 3 4 5 6 7, three bits each, lowest first: 21 bits."""
    stream = sum(code << (3 * i) for i, code in enumerate(range(1, 8)))
    arrays = packed("int3", row(-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0))
    assert stream == 0b111_110_101_100_011_010_001
    assert octets(arrays["packed"]) == [0b11010001, 0b01011000, 0b00011111, 0]
    assert arrays["scale"].tolist() == [[1.0]]


def test_asymmetric_int2_row() -> None:
    """Range −1 … 2 in three steps of 1: zero-point 1, codes 0 1 2 3."""
    arrays = packed("int2-asym-g16", row(-1.0, 0.0, 1.0, 2.0))
    assert octets(arrays["packed"]) == [0b11_10_01_00, 0, 0, 0]
    assert octets(arrays["scale"]) == half(1.0)
    assert octets(arrays["zero"]) == [1]


def test_nf4_row() -> None:
    """Scale 2; −2 is code 0, 0 is code 7, 2 is code 15; 0.16 · 2 is nearest to level 0.1609, code 9."""
    arrays = packed("nf4", row(-2.0, 0.0, 2.0, 0.32))
    assert octets(arrays["packed"]) == [0x70, 0x9F, 0, 0]
    assert arrays["scale"].tolist() == [[2.0]]


def test_ternary_row() -> None:
    """Mean magnitude 0.8; trits 2 0 1 2 0 (code + 1) make 2 + 0·3 + 1·9 + 2·27 + 0·81 = 65, then 1·1 + 2·3 = 7."""
    arrays = packed("ternary", row(1.0, -1.0, 0.3, 1.0, -1.0, 0.3, 1.0))
    assert octets(arrays["trits"]) == [65, 7]
    assert arrays["scale"].item() == pytest.approx(5.6 / 7)


def test_binary_row() -> None:
    """Signs + − + + − − − − + make bits 1 0 1 1 0 0 0 0 1, lowest first; mean magnitude 0.5."""
    arrays = packed("binary-g64", row(0.5, -0.5, 0.5, 0.25, -0.75, -0.5, -0.5, -0.5, 0.5))
    assert octets(arrays["signs"]) == [0b00001101, 1, 0, 0]
    assert octets(arrays["scale"]) == half(0.5)


def test_mxfp4_row() -> None:
    """Largest 3 = 1.5 · 2¹, so exponent 1 − 2 = −1, stored as 126; w / 0.5 = 6 −1 0.5 → 0111, 1010, 0001."""
    arrays = packed("mxfp4", row(3.0, -0.5, 0.25))
    assert octets(arrays["packed"]) == [0xA7, 0x01]
    assert octets(arrays["scale"]) == [126]


def test_nvfp4_row() -> None:
    """One group: global scale 448 · 6 / 6 = 448, so the group's is 448 (E4M3 0 1111 110); codes of 6, −3, 0.5."""
    arrays = packed("nvfp4", row(6.0, -3.0, 0.5))
    assert octets(arrays["packed"]) == [0xD7, 0x01]
    assert octets(arrays["scale"]) == [0b0_1111_110]
    assert arrays["global_scale"].tolist() == [[448.0]]


def test_fp8_row() -> None:
    """448 is 0 1111 110; 1.0 is 0 0111 000; −0.5 is 1 0110 000."""
    arrays = packed("fp8-e4m3", row(448.0, 1.0, -0.5))
    assert octets(arrays["weight"]) == [0b0_1111_110, 0b0_0111_000, 0b1_0110_000]


def test_q4_0_block() -> None:
    """d = −8 / −8 = 1; −8 is code 0, 0 is 8, 7 is 15; byte j holds codes j and j + 16."""
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 16], w[0, 17] = -8.0, 7.0, 1.0
    assert octets(packed("q4_0", w)["blocks"]) == [*half(1.0), 0xF0, 0x98, *[0x88] * 14]


def test_q8_0_block() -> None:
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1], w[0, 31] = 127.0, -127.0, 3.0
    assert octets(packed("q8_0", w)["blocks"]) == [*half(1.0), 127, 256 - 127, *[0] * 29, 3]


def test_q5_1_block() -> None:
    """From −1 in 31 steps of 0.5: code j is j; fifth bits are set for codes 16 … 31."""
    w = (torch.arange(32) * 0.5 - 1)[None]
    expected = [*half(0.5), *half(-1.0), 0x00, 0x00, 0xFF, 0xFF, *[(j << 4) | j for j in range(16)]]
    assert octets(packed("q5_1", w)["blocks"]) == expected


def test_double_quantized_scales() -> None:
    """Two groups of scale 1 and 3: mean 2, step 1/127, codes −127 and 127."""
    arrays = packed("nf4-dq", torch.cat([torch.ones(1, 64), torch.full((1, 64), 3.0)], 1))
    assert arrays["scale_code"].tolist() == [[-127, 127]]
    assert arrays["scale_mean"].tolist() == [2.0]
    assert arrays["scale_step"].item() == pytest.approx(1 / 127)


def test_scales_in_bfloat16() -> None:
    format = format_named("int4-g128-bf16")
    w = row(0.1, -0.7)
    scale = format.fit(w)["scale"]
    assert format.pack(format.round(w, {"scale": scale}), {"scale": scale})["scale"].dtype == torch.bfloat16
    assert scale.item() == torch.tensor(0.1).bfloat16().item()
    assert format.nbytes((2, 256)) == FORMATS["int4-g128"].nbytes((2, 256))


def test_bits_per_weight() -> None:
    shape = (4096, 4096)
    per_weight = {name: 8 * FORMATS[name].nbytes(shape) / math.prod(shape) for name in FORMATS}
    assert per_weight["int4-g128"] == 4 + 16 / 128
    assert per_weight["int4-asym-g32"] == 4 + (16 + 8) / 32
    assert per_weight["nf4"] == 4 + 32 / 64
    assert per_weight["nf4-dq"] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert per_weight["mxfp4"] == 4.25
    assert per_weight["nvfp4"] == pytest.approx(4.5, abs=1e-4)
    assert per_weight["q4_0"] == 4.5
    assert per_weight["q5_1"] == 6.0
    assert per_weight["ternary-g64"] == pytest.approx(1.6 + 16 / 64, abs=2e-3)  # 4096 = 819 · 5 + 1


@pytest.mark.parametrize("name", ["int4-g33", "int9", "", "int8-bf16", "q4_0-bf16", "Int8", "fp32-bf16"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"format '{name}' is not known"):
        format_named(name)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(FormatError, match=r"did you mean .*int4-g128"):
        format_named("int4_g128")


def super_block(codes: list[int], **params: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
    """One row of 256 codes that repeat, and its params by sub-block."""
    return torch.tensor(codes, dtype=torch.uint8).repeat(256 // len(codes))[None], {
        key: row(*values) for key, values in params.items()
    }


def test_bytes_of_a_q4_k_super_block() -> None:
    """Scales 1, 2, 3, 63 | 16, 47, 0, 33 and minima 0, 5, 32, 63 | 1, 17, 62, 48: the high two bits of the last four
    stand above the first four, their low nibbles, scale below minimum, in four bytes of their own.
    """
    codes, params = super_block(
        list(range(16)) * 2 + list(range(15, -1, -1)) * 2,
        factor=[0.5] * 8,
        steps=[1, 2, 3, 63, 16, 47, 0, 33],
        minimum_factor=[2.0] * 8,
        minimum_steps=[0, 5, 32, 63, 1, 17, 62, 48],
    )
    found = octets(FORMATS["q4_k"].pack(codes, params)["blocks"])
    scales = [1 | 1 << 6, 2 | 2 << 6, 3, 63 | 2 << 6]
    minima = [0, 5 | 1 << 6, 32 | 3 << 6, 63 | 3 << 6]
    late = [0 | 1 << 4, 15 | 1 << 4, 0 | 14 << 4, 1 | 0 << 4]
    nibbles = [i % 16 | (15 - i % 16) << 4 for i in range(32)] * 4
    assert found == [*half(0.5), *half(2.0), *scales, *minima, *late, *nibbles]
    # Number 33, the second of the second sub-block: 0.5 · 2 · 14 − 2 · 5.
    assert FORMATS["q4_k"].decode(codes, params)[0, 33].item() == 4.0


def test_bytes_of_a_q6_k_super_block() -> None:
    """Low nibbles of numbers n and n + 64 share a byte, high pairs of bits those of n, n + 32, n + 64 and n + 96."""
    codes, params = super_block(list(range(64)), factor=[0.25] * 16, steps=list(range(-8, 8)))
    found = octets(FORMATS["q6_k"].pack(codes, params)["blocks"])
    low = [n % 16 | (n % 16) << 4 for n in range(64)] * 2
    high = [sum(((n + 32 * j) % 64 >> 4) << (2 * j) for j in range(4)) for n in range(32)] * 2
    assert found == [*low, *high, *[step % 256 for step in range(-8, 8)], *half(0.25)]
    # Number 255, of code 63 in the last sub-block: 0.25 · 7 · (63 − 32).
    assert FORMATS["q6_k"].decode(codes, params)[0, 255].item() == 54.25


def test_bytes_of_a_q8_k_block() -> None:
    """Codes −128 … 127 at scale 0.25: sums of 16 neighbours as int16, from −1928 in steps of 256."""
    codes = torch.arange(-128, 128, dtype=torch.int8)[None]
    found = octets(FORMATS["q8_k"].pack(codes, {"scale": row(0.25)})["blocks"])
    sums = [sum(range(-128 + 16 * j, -112 + 16 * j)) for j in range(16)]
    assert (sums[0], sums[15]) == (-1928, 1912)
    assert found == [
        0,
        0,
        0x80,
        0x3E,
        *range(128, 256),
        *range(128),
        *(b for s in sums for b in (s & 255, s >> 8 & 255)),
    ]
    assert FORMATS["q8_k"].decode(codes, {"scale": row(0.25)})[0, 1].item() == -31.75


def test_plain_q8_k_gives_the_first_of_the_largest_code_minus_127() -> None:
    w = torch.zeros(1, 256)
    w[0, :4] = torch.tensor([1.0, -254.0, 254.0, 3.0])  # 2 a step; 0.5 and 1.5 go to the even neighbour
    codes, params = FORMATS["q8_k"].plain(w)
    assert (codes[0, :5].tolist(), params["scale"].tolist()) == ([0, -127, 127, 2, 0], [[2.0]])


def test_bytes_of_a_q3_k_super_block() -> None:
    """Steps count from −32: 0, 63, 37 and so on, four low bits each in eight bytes, two high bits in four more."""
    steps = [0, 63, 37, 32, 31, 16, 15, 1, 2, 3, 4, 5, 48, 47, 62, 33]
    codes, params = super_block(list(range(8)), factor=[1.0] * 16, steps=[step - 32 for step in steps])
    found = octets(FORMATS["q3_k"].pack(codes, params)["blocks"])
    mask = [0xFF if n % 8 > 3 else 0 for n in range(32)]
    low = [(n % 4) * 0b01010101 for n in range(32)] * 2
    packed_steps = [steps[i] % 16 | (steps[i + 8] % 16) << 4 for i in range(8)]
    packed_steps += [sum((steps[i + 4 * j] >> 4) << (2 * j) for j in range(4)) for i in range(4)]
    assert found == [*mask, *low, *packed_steps, *half(1.0)]
    # Number 16, of code 0, in the second sub-block: 31 · (0 − 4).
    assert FORMATS["q3_k"].decode(codes, params)[0, 16].item() == -124.0


def test_bytes_of_a_tq1_0_block() -> None:
    """All ones: five trits of 2 are 242, and ⌈242·256/243⌉ = 255; the last four bytes hold four, 240 and then 253."""
    codes = torch.ones(1, 256, dtype=torch.int8)
    found = octets(FORMATS["tq1_0"].pack(codes, {"scale": row(0.5)})["blocks"])
    assert found == [255] * 48 + [253] * 4 + half(0.5)
