"""Codes and scales as ONNX has them: a format is refused or decodes to its own numbers; bytes worked out by hand."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from fewbits.checkpoint import Entry, Reader
from fewbits.engine.weights import Weight
from fewbits.errors import FormatError, UnsupportedError
from fewbits.export.blocks import packed_blocks, packed_zeros
from fewbits.export.express import _given
from fewbits.export.integers import Integers, integers, layout
from fewbits.formats import FORMATS, Affine, Float, Format, QTensor, format_named
from fewbits.formats.binary import Binary
from fewbits.formats.ternary import Ternary

ir = pytest.importorskip("onnx_ir")
SHAPE = (6, 288)  # 288 is no multiple of 64, so last groups are ragged


class OneTensor:
    """A reader of one tensor."""

    def __init__(self, tensor: QTensor) -> None:
        self.tensor = tensor

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        assert rows is None
        return self.tensor


def weight_in(format: Format, shape: tuple[int, ...]) -> tuple[Weight, torch.Tensor]:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    params = format.fit(w)
    q = QTensor(format, format.round(w, params), params)
    return Weight(cast(Reader, OneTensor(q)), Entry("w", shape, format)), q.dequantize()


def expressed(format: Format) -> bool:
    """Integers, ternary, binary, and GGUF's blocks of one scale for evenly spaced levels."""
    gguf = {"q4_0", "q5_0", "q8_0", "q8_k", "q3_k", "q6_k", "tq1_0", "tq2_0"}
    return isinstance(format, Affine | Ternary | Binary) or format.name in gguf


def decoded(weight: Integers, group: int | str) -> torch.Tensor:
    columns = weight.codes.shape[1]
    size = group if isinstance(group, int) else columns
    params = [weight.scale, torch.zeros_like(weight.scale) if weight.zero is None else weight.zero.float()]
    scale, zero = (p.repeat_interleave(size, 1)[:, :columns] for p in params)
    return (weight.codes.float() - zero) * scale


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if not isinstance(format, Float)])
def test_every_format_is_refused_or_keeps_its_numbers(name: str) -> None:
    format = FORMATS[name]
    try:
        format.check(SHAPE)
        shape = SHAPE
    except FormatError:
        shape = (6, 256)
    weight, expected = weight_in(format, shape)
    if not expressed(format):
        with pytest.raises(UnsupportedError, match="int8 or int4-g32"):
            integers(weight)
        return
    plan, found = layout("w", format), integers(weight)
    assert plan.range[0] <= int(found.codes.min())
    assert int(found.codes.max()) <= plan.range[1]
    assert torch.equal(decoded(found, plan.group), expected)


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "fp8-e4m3", "llm-int8", "q4_1", "q4_k", "mlx4-g64", "iq4_nl"])
def test_what_dequantizelinear_cannot_say_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"w: .*{name}"):
        layout("w", format_named(name))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int8", "INT8"), ("int8-asym", "UINT8"), ("int6-g32", "INT8"), ("int4-g32", "INT4"), ("int3-asym-g16", "UINT4"),
     ("ternary", "INT4"), ("q8_0", "INT8"), ("q4_0", "INT4")],
)  # fmt: skip
def test_types(name: str, dtype: str) -> None:
    assert layout("w", format_named(name)).dtype == dtype


def test_a_zero_point_that_does_not_fit_is_refused() -> None:
    """GPTQ's first version can say 16."""
    weight, _ = weight_in(format_named("int4-asym-g32"), SHAPE)
    cast(Any, weight.reader).tensor.params["zero"].fill_(16)
    with pytest.raises(UnsupportedError, match="a zero-point is 16, and UINT4 ends at 15"):
        integers(weight)


def test_four_bit_tensors_by_hand() -> None:
    """Two to a byte, the first one low (ONNX, onnx.proto: raw_data of INT4): −8 is 8, −1 is 15."""
    assert _given(np.array([[-8, 7], [1, -1], [3, 0]], np.int8), ir.DataType.INT4).tobytes() == b"\x78\xf1\x03"
    assert _given(np.array([15, 1, 9], np.uint8), ir.DataType.UINT4).tobytes() == b"\x1f\x09"


def test_blocks_of_bytes_by_hand() -> None:
    """Signed codes are stored 8 higher; the second block ends with zeros."""
    codes = torch.tensor([[-8, 7, *14 * [0], 1, -1]], dtype=torch.int8)
    plan = layout("w", Affine(bits=4, group=16))
    bytes_ = packed_blocks(Integers(codes, torch.ones(1, 2), None), plan)
    assert bytes_.shape == (1, 2, 8)
    assert bytes_.tobytes() == b"\xf0" + 7 * b"\x88" + b"\x79" + 7 * b"\x00"


def test_zero_points_by_hand() -> None:
    plan = layout("w", Affine(bits=4, symmetric=False, group=16))
    zero = torch.tensor([[1, 15, 2], [3, 0, 7]], dtype=torch.uint8)
    packed = packed_zeros(Integers(torch.zeros(2, 48, dtype=torch.uint8), torch.ones(2, 3), zero), plan)
    assert packed.tolist() == [[0xF1, 0x02], [0x03, 0x07]]
