"""Any numbers, any shape: packing loses nothing, and rounding again changes nothing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats import FORMATS, Format, QTensor
from fewbits.formats._bits import pack_bits, pack_trits, unpack_bits, unpack_trits

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
numbers = st.floats(-1e4, 1e4, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    values = draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values).reshape(rows, columns)


@quick
@given(format=st.sampled_from(list(FORMATS.values())), w=matrices(), search=st.booleans())
def test_what_is_packed_comes_back(format: Format, w: Tensor, search: bool) -> None:
    try:
        params = format.fit(w, search=search)
    except FormatError:
        return
    q = QTensor(format, format.round(w, params), params)
    back = QTensor.from_arrays(format, q.pack(), q.shape)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert back.dequantize().isfinite().all()
    again = format.round(back.dequantize(), back.params)
    assert torch.equal(format.decode(again, back.params), q.dequantize())


@quick
@given(bits=st.integers(1, 8), columns=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_bit_streams(bits: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, columns), codes)


@quick
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_trits(codes: list[int]) -> None:
    trits = torch.tensor([codes], dtype=torch.uint8)
    assert torch.equal(unpack_trits(pack_trits(trits), len(codes)), trits)
