"""The layout of tiles, against bytes worked out by hand and a reading of the layout bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from fewbits.runtime.tiles import (
    PLANES,
    Direct,
    Floats,
    Stepped,
    Tiles,
    Zeros,
    arrays,
    blocks,
    codes,
    decode,
    groups,
    panels,
)


def one_panel(bits: int, packed: np.ndarray) -> Tiles:
    """16 rows and 32 columns of these bytes, at scale 1."""
    return Tiles(16, 32, bits, 32, 0, packed.reshape(1, 1, -1), Direct(np.ones((1, 1, 16), np.float32)))


@pytest.mark.parametrize(
    ("bits", "byte", "value", "row", "column", "code"),
    [
        # One plane of 4 bits: vector j holds step j in its low halves and step j + 4 in its high ones.
        (4, 0, 0x0B, 0, 0, 0xB),
        (4, 0, 0xB0, 0, 16, 0xB),
        (4, 64 + 4 * 3 + 2, 0x0B, 3, 4 + 2, 0xB),
        (4, 3 * 64 + 4 * 15 + 3, 0xB0, 15, 31, 0xB),
        # 8 bits: vector j is step j.
        (8, 64 * 7 + 4 * 2 + 1, 0xC8, 2, 29, 0xC8),
        # 1 bit: bit i is step i.
        (1, 4 * 5 + 1, 1 << 6, 5, 6 * 4 + 1, 1),
        # 2 bits: vector j, bits 2i and 2i + 1 are step j + 2i.
        (2, 64 + 4, 0b11 << 4, 1, (1 + 2 * 2) * 4, 3),
        # 3 bits: first the plane of the highest bit (64 bytes), then that of the lower two.
        (3, 4 * 9 + 2, 1 << 3, 9, 3 * 4 + 2, 4),
        (3, 64 + 64 + 4 * 9 + 2, 0b10 << 6, 9, (1 + 2 * 3) * 4 + 2, 2),
        # 6 bits: first the plane of the two highest bits (128 bytes), then that of the lower four.
        (6, 64 + 7, 0b01 << 2, 1, (1 + 2) * 4 + 3, 16),
        (6, 128 + 7, 0x0D, 1, 3, 0xD),
        # 7 bits: bit 6, then bits 4 and 5, then the others.
        (7, 0, 1, 0, 0, 64),
        (7, 64, 1, 0, 0, 16),
        (7, 192, 1, 0, 0, 1),
    ],
)
def test_a_byte_lies_where_the_layout_says(bits, byte, value, row, column, code):
    packed = np.zeros(bits * 64, np.uint8)
    packed[byte] = value
    expected = np.zeros((16, 32), np.uint8)
    expected[row, column] = code
    assert np.array_equal(codes(one_panel(bits, packed)), expected)


def bit_by_bit(tile: Tiles) -> np.ndarray:
    """The codes, each bit of each found by the sentence in the module's docstring."""
    found = np.zeros((tile.rows, tile.columns), np.uint8)
    for row in range(tile.rows):
        for column in range(tile.columns):
            data = tile.codes[row // 16, column // 32]
            step, byte, start, left = column % 32 // 4, 4 * (row % 16) + column % 4, 0, tile.bits
            for width in PLANES[tile.bits]:
                i, j = divmod(step, width)
                left -= width
                found[row, column] |= (data[start + 64 * j + byte] >> (width * i) & ((1 << width) - 1)) << left
                start += 64 * width
    return found


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_bit_of_several_panels(bits):
    rng = np.random.default_rng(bits)
    packed = rng.integers(0, 256, (2, 3, bits * 64), np.uint8)
    scale = Direct(np.ones((2, 2, 16), np.float32))
    tile = Tiles(21, 70, bits, 48, 0, packed, scale)
    assert np.array_equal(codes(tile), bit_by_bit(tile))


def test_params_lie_by_panel_group_and_row():
    """18 rows, 40 columns in groups of 16: four groups, the last of filled-up columns alone."""
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (2, 2, 256), np.uint8)
    scale = rng.standard_normal((2, 4, 16)).astype(np.float16)
    zeros = rng.integers(0, 16, (2, 4, 16), np.uint8)
    tile = Tiles(18, 40, 4, 16, 0, packed, Direct(scale), Zeros(zeros))
    u = codes(tile)
    for row, column in ((0, 0), (15, 17), (16, 39), (17, 32)):
        s, z = (float(p[row // 16, column // 16, row % 16]) for p in (scale, zeros))
        assert decode(tile)[row, column] == np.float32((u[row, column] - z) * s)


def test_two_levels_and_a_table():
    packed = np.full((1, 1, 256), 0x21, np.uint8)  # code 1 in steps 0 … 3, code 2 in steps 4 … 7
    factor = np.full((1, 1, 16), 0.5, np.float16)
    steps = np.array([3, -2], np.int8).reshape(1, 2, 1).repeat(16, 2)
    table = np.array([0, 10, 20, *[0] * 13], np.uint8)
    tile = Tiles(16, 32, 4, 16, 5, packed, Stepped(factor, steps, 2), Stepped(-factor, steps, 2), table)
    first, second = (10 - 5) * 0.5 * 3 - 0.5 * 3, (20 - 5) * 0.5 * -2 - 0.5 * -2
    assert np.array_equal(decode(tile), np.repeat([[first, second]], 16, 0).repeat(16, 1))


def test_floats_are_read_in_each_type():
    numbers = np.array([1.5, -2.0, 0.15625], np.float32)  # exact in all three
    kinds = {"f32": numbers, "f16": numbers.astype(np.float16), "bf16": (numbers.view(np.uint32) >> 16).astype("u2")}
    for kind, row in kinds.items():
        values = np.zeros((1, 32, 16), row.dtype)
        values[0, :3, 4] = row
        assert np.array_equal(decode(Floats(5, 3, kind, values))[4], numbers), kind
        scaled = Floats(5, 3, kind, values, 32, Direct(np.full((1, 1, 16), 4, np.float16)))
        assert np.array_equal(decode(scaled)[4], 4 * numbers), kind


def test_counts():
    assert (panels(1), panels(16), panels(17)) == (1, 1, 2)
    assert (blocks(32), blocks(33)) == (1, 2)
    assert (groups(40, 16), groups(40, 64), groups(33, 48)) == (4, 1, 2)
    tile = Tiles(16, 32, 4, 16, 0, np.zeros((1, 1, 256), np.uint8), Direct(np.zeros((1, 2, 16), np.float16)))
    assert set(arrays(tile)) == {"codes", "scale"}
    assert tile.nbytes == 256 + 2 * 16 * 2
