"""The same numbers in another format, or a reason: never other numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats import FORMATS, Affine, Format, Grouped, QTensor, format_named
from fewbits.formats.act_order import ActOrder
from fewbits.formats.recode import recode

WEIGHTS = 0.02 * torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
TWO_LEVELS = ("nvfp4", "nf4-dq", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
QUANTIZED = [name for name, format in FORMATS.items() if isinstance(format, Grouped)]


def rounded(format: Format | str, w: Tensor = WEIGHTS) -> QTensor:
    format = format_named(format) if isinstance(format, str) else format
    params = format.fit(w)
    return QTensor(format, format.round(w, params), params)


def of_codes(format: str, codes: list[int], **params: float) -> QTensor:
    """One group of these codes, repeated to fill it."""
    known: Any = format_named(format)
    width = known.group
    row = torch.tensor([(codes * width)[:width]])
    made = row.to(torch.int8 if known.levels[0] < 0 and known.name.startswith("int") else torch.uint8)
    return QTensor(known, made, {key: torch.tensor([[value]]) for key, value in params.items()})


def moves(source: QTensor, target: str) -> QTensor:
    """Recoded, with the numbers compared as the target's bytes hold them."""
    found = recode(source, format_named(target))
    stored = QTensor.from_arrays(found.format, found.pack(), found.shape)
    assert found.format.name == target
    assert torch.equal(stored.dequantize(), source.dequantize())
    return found


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(QUANTIZED), st.sampled_from(list(FORMATS)), st.integers(0, 2**31), st.integers(-20, 20))
def test_numbers_never_change(source: str, target: str, seed: int, exponent: int) -> None:
    """Any pair of formats, numbers of any size: equal, bit for bit but for the sign of zero, or a reason."""
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    try:
        q = rounded(source, w)
    except FormatError:
        return  # FP16 has no such scales
    try:
        found = recode(q, FORMATS[target])
    except FormatError:
        assert source != target
        return
    assert torch.equal(found.dequantize(), q.dequantize())
    assert torch.equal(QTensor.from_arrays(found.format, found.pack(), found.shape).dequantize(), q.dequantize())


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.sampled_from(["row", "tensor", 16, 32, 64]), st.integers(0, 2**31))
def test_integers_of_random_codes_move_to_more_bits(bits: int, symmetric: bool, group: Any, seed: int) -> None:
    """Every code, any zero-point, scales of either sign: finer groups, as many bits or more, always hold them."""
    if bits == 7:
        return
    made = torch.Generator().manual_seed(seed)
    format = Affine(bits=bits, symmetric=symmetric, group=group)
    shape = format.groups((8, 128))
    codes = torch.randint(format.lowest, format.highest + 1, (8, 128), generator=made)
    params = {"scale": format.stored(torch.randn(shape, generator=made))}
    if not symmetric:
        params["zero"] = torch.randint(0, format.highest + 1, shape, generator=made).float()
    q = QTensor(format, codes.to(torch.int8 if symmetric else torch.uint8), params)
    finer = 16 if isinstance(group, int) else group
    for wider in range(bits, 9):
        target = Affine(bits=wider, symmetric=False, group=finer) if wider != 7 else format
        assert torch.equal(recode(q, target).dequantize(), q.dequantize())
    if bits < 8:
        assert torch.equal(recode(q, Affine(bits=8, group=finer)).dequantize(), q.dequantize())


@pytest.mark.parametrize("name", QUANTIZED)
def test_placed_is_the_inverse_of_scale_and_offset(name: str) -> None:
    """Of a format's own params, wherever its scales are free; elsewhere it says that they are not."""
    q = rounded(name)
    format: Any = q.format
    scale = format.scale_at(q.params)
    lowest = format.levels[0] * scale + format.offset_at(q.params)
    if name in TWO_LEVELS:
        with pytest.raises(FormatError, match="made of others above them"):
            format.placed(scale, lowest)
        return
    decoded, same = format.decode(q.codes, format.placed(scale, lowest)), q.dequantize()
    # absmax of LLM.int8 is the scale over 1/127, two roundings apart from where it came from
    assert torch.allclose(decoded, same, rtol=2**-22, atol=0) if name == "llm-int8" else torch.equal(decoded, same)


LOSSLESS = {
    "q4_0": ("int4-g32", "int4-asym-g32", "int4-g16", "q4_1", "q5_0", "q5_1", "q8_0", "mlx4-g32", "int8-g32"),
    "q4_1": ("q5_1", "mlx4-g32", "mlx8-g32"),
    "q5_0": ("int5-g32", "int8-g32", "q5_1", "q8_0", "mlx5-g32"),
    "q8_0": ("int8-g32", "int8-asym-g16", "mlx8-g32"),
    "q6_k": ("int6-g16-fp32", "int8-g16-fp32"),
    "q3_k": ("int3-g16-fp32",),
    "q4_k": ("mlx4-g32-fp32",),
    "q5_k": ("mlx5-g32-fp32",),
    "iq4_nl": ("q8_0", "int8-g32"),
    "iq4_xs": ("int8-g32-fp32",),
    "int4-g128": ("q4_0", "int4-g32", "int4-asym-g128", "mlx4-g128"),
    "int4-asym-g128": ("q5_0", "int4-asym-g64", "int8-g128", "mlx4-g128-fp32"),
    "mlx4-g32": ("q4_1", "q5_1"),
    "mxfp4": ("q5_0", "int5-g32", "fp8-e4m3"),
    "nvfp4": ("int5-g16-fp32",),
    "nf4-dq": ("nf4", "nf4-g32"),
    "nf4": ("nf4-g32",),
    "fp8-e4m3-tensor": ("fp8-e4m3", "fp8-e4m3-b128"),
    "tq1_0": ("tq2_0", "ternary-g128", "q4_0", "int2-g128"),
    "ternary-g128": ("int2-g128", "q4_0"),
    "binary-g128": ("ternary-g128", "int2-g128"),
}


@pytest.mark.parametrize(("source", "target"), [(s, t) for s, targets in LOSSLESS.items() for t in targets])
def test_what_is_lossless_whatever_the_weights(source: str, target: str) -> None:
    moves(rounded(source), target)


def test_what_the_registry_does_not_name_is_no_case_of_its_own() -> None:
    """Groups of 256, which other programs write: four of 64."""
    found = moves(rounded(Affine(bits=4, group=256)), "int4-g64")
    assert torch.equal(
        found.params["scale"], rounded(Affine(bits=4, group=256)).params["scale"].repeat_interleave(4, 1)
    )


def test_codes_by_hand() -> None:
    """Q4_0's codes less 8 are int4's, with 8 as zero-point they are the same; Q4_1's minimum is −8·d."""
    q = of_codes("q4_0", [0, 8, 15], scale=0.5)
    assert moves(q, "int4-g32").codes[0, :3].tolist() == [-8, 0, 7]
    asymmetric = moves(q, "int4-asym-g32")
    assert (asymmetric.codes[0, :3].tolist(), asymmetric.params["zero"].item()) == ([0, 8, 15], 8.0)
    offset = moves(q, "q4_1")
    assert (offset.codes[0, :3].tolist(), offset.params["offset"].item()) == ([0, 8, 15], -4.0)


def test_one_scale_for_a_matrix_where_all_blocks_have_it() -> None:
    """A trained ternary model comes back from TQ2_0 as it was; blocks without a weight may have any scale."""
    codes = torch.randint(-1, 2, (8, 512), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    codes[3, :256] = 0
    whole = QTensor(format_named("ternary-tensor"), codes, {"scale": torch.full((1, 1), 0.03125)})
    blocks = moves(whole, "tq2_0")
    scales = {**blocks.params, "scale": blocks.params["scale"].clone()}
    scales["scale"][3, 0] = 0.0
    assert torch.equal(moves(QTensor(blocks.format, blocks.codes, scales), "ternary-tensor").codes, codes)


REASONS = [
    (of_codes("int4-g32", [-8, 7], scale=0.1).dequantize(), "int4", "q4_0", "a scale is 0.114285715, must be in FP16"),
    (None, "int4-asym-g32", "int4-g32", "numbers would change"),
    (None, "q4_0", "int4-g128", "numbers would change"),
    (None, "q4_1", "int4-asym-g32", "numbers would change|zero-point"),
    (None, "q4_0", "nf4", "numbers would change"),
    (None, "q4_0", "q4_k", "made of others above them"),
    (None, "q4_0", "mxfp4", "must be a power of two"),
    (None, "nf4", "q4_0", "must be in FP16"),
]


@pytest.mark.parametrize(("w", "source", "target", "reason"), REASONS)
def test_reasons(w: Tensor | None, source: str, target: str, reason: str) -> None:
    q = rounded(source, WEIGHTS if w is None else w)
    with pytest.raises(FormatError, match=reason):
        recode(q, format_named(target))


def test_values_and_requirements_are_named() -> None:
    wide = of_codes("int8-asym-g32", [0, 255], scale=1.0, zero=17.0)
    with pytest.raises(FormatError, match="int4-asym-g32: a zero-point is 17, must be from 0 to 15"):
        recode(wide, format_named("int4-asym-g32"))
    with pytest.raises(FormatError, match=r"its offset is -6\.00585938, must be in FP16"):
        recode(of_codes("int8-asym-g32", [0, 3], scale=2 + 2**-9, zero=3.0), format_named("q5_1"))
    with pytest.raises(FormatError, match="q4_0: 16 of 32 numbers would change, the first from 8 to 7"):
        recode(of_codes("int8-g32", [8, 1], scale=1.0), format_named("q4_0"))
    order = ActOrder(Affine(bits=4, group=32))
    with pytest.raises(FormatError, match="not in groups of neighbours"):
        recode(rounded(order), format_named("int4-g32"))
    with pytest.raises(FormatError, match="not a multiple of its block of 256"):
        recode(rounded("q4_0", WEIGHTS[:, :96]), format_named("tq2_0"))


def test_a_scale_of_nothing_moves() -> None:
    moves(rounded("q4_0", torch.zeros(2, 64)), "int4-asym-g32")
    moves(rounded("mxfp4", torch.zeros(2, 64)), "q5_0")


def test_floating_point_is_exact_or_refused() -> None:
    half = rounded("fp16")
    assert recode(half, format_named("fp32")).codes.dtype == torch.float32
    assert torch.equal(recode(recode(half, format_named("fp32")), format_named("fp16")).codes, half.codes)
    with pytest.raises(FormatError, match="would change"):
        recode(half, format_named("bf16"))
    with pytest.raises(FormatError, match="65504"):
        recode(rounded("fp32", torch.full((2, 2), 1e6)), format_named("fp16"))
    double = QTensor(type(half.format)(torch.float64), torch.tensor([[1 + 2.0**-40]], dtype=torch.float64), {})
    with pytest.raises(FormatError, match="would change"):
        recode(double, format_named("fp32"))
