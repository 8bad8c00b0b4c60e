"""Bytes and numbers against programs that others wrote: gguf-py, compressed-tensors, torch's own float8."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quants as gguf
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats import FORMATS, QTensor
from fewbits.formats._bits import pack_bits, unpack_bits
from fewbits.formats._blocks import Block
from fewbits.formats.codebook import NF4
from fewbits.formats.gguf_mxfp4 import MxFp4Blocks

BLOCKS = [*(name for name, format in FORMATS.items() if isinstance(format, Block) and format.runs), "mxfp4"]
ENCODED = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "tq1_0", "tq2_0"]
"""gguf-py decodes all of them, and encodes these."""


def block(name: str) -> Block:
    format = MxFp4Blocks() if name == "mxfp4" else FORMATS[name]
    assert isinstance(format, Block)
    return format


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(w: Tensor, name: str) -> Tensor:
    """gguf-py's encoding of w, in full blocks: uint8 [..., bytes]."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it divides by scales that are zero or subnormal
        return torch.from_numpy(gguf.quantize(w.numpy(), GGMLQuantizationType[name.upper()]))


def decoded(blocks: Tensor, name: str) -> Tensor:
    """gguf-py's decoding."""
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), GGMLQuantizationType[name.upper()]))


def plain(w: Tensor, name: str) -> Tensor:
    return block(name).pack(*block(name).plain(w))["blocks"]


CORPUS = {
    "weights": normal(400, 512) * 0.02,
    "fp16 weights": (normal(400, 512, seed=1) * 0.02).half().float(),
    "bf16 weights": (normal(400, 512, seed=2) * 0.02).bfloat16().float(),
    "ties between codes": torch.randint(-16, 17, (200, 512), generator=torch.Generator().manual_seed(3)) / 16,
    "ties between bytes": torch.randint(-254, 255, (200, 512), generator=torch.Generator().manual_seed(4)) / 2,
    "one value": torch.full((2, 256), 0.3),
    "one negative value": torch.full((2, 256), -0.3),
    "both signs of one value": torch.full((2, 256), 0.3) * torch.tensor([1.0, -1.0]).repeat(128),
    "zeros": torch.zeros(2, 256),
    "negative zeros": -torch.zeros(2, 256),
    "zeros of both signs among numbers": torch.where(torch.arange(256) % 3 == 0, -0.0, normal(40, 256)),
    "one outlier": torch.where(torch.arange(256) == 7, 900.0, normal(40, 256)),
    **{f"numbers near {size:g}": normal(40, 256) * size for size in (1e-45, 1e-30, 1e-8, 1e-7, 1e-6, 1e-4, 1e3, 1e4)},
}


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("case", CORPUS)
def test_plain_blocks_equal_gguf_py(case: str, name: str) -> None:
    assert torch.equal(plain(CORPUS[case], name), reference(CORPUS[case], name))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("case", CORPUS)
def test_blocks_decode_exactly_in_gguf_py(case: str, name: str) -> None:
    w, format = CORPUS[case], block(name)
    for search in (False, True):
        params = format.fit(w, search=search)
        q = QTensor(format, format.round(w, params), params)
        assert torch.equal(q.dequantize(), decoded(q.pack()["blocks"], name))
    if name in ENCODED:
        q = QTensor.from_arrays(format, {"blocks": reference(w, name)}, tuple(w.shape))
        assert torch.equal(q.dequantize(), decoded(reference(w, name), name))


@pytest.mark.parametrize("name", BLOCKS)
def test_any_bytes_are_a_block(name: str) -> None:
    """Every bit of a block, drawn by lot, means what it means to gguf-py, and is written again as it was."""
    format, rows, blocks = block(name), 50, 3
    generator = torch.Generator().manual_seed(0)
    fields = [
        torch.randn(rows, blocks, 1, generator=generator).half().view(torch.uint8)
        if field in ("d", "m", "dmin")
        else torch.randint(
            0, 256 if field != "e" else 250, (rows, blocks, size), dtype=torch.uint8, generator=generator
        )
        for field, size in format.fields
    ]
    data = torch.cat(fields, dim=-1).flatten(-2)
    q = QTensor.from_arrays(format, {"blocks": data}, (rows, blocks * format.span))
    assert torch.equal(q.dequantize(), decoded(data, name))
    if name not in ("tq1_0", "tq2_0"):  # where several bytes mean the same trits
        assert torch.equal(q.pack()["blocks"], data)


@pytest.mark.parametrize("name", ENCODED)
def test_scales_that_gguf_py_would_lose_are_lost_here_too(name: str) -> None:
    """Where 1/d overflows, gguf-py's codes are undefined casts of infinities; the numbers they mean are still zeros."""
    tiny = normal(40, 256) * 1e-40
    assert not QTensor(block(name), *block(name).plain(tiny)).dequantize().any()


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "mxfp4"])  # whose scales reach 2¹²⁷
def test_scales_beyond_fp16_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=r"overflows its stored type \(largest weight 1e\+30\)"):
        block(name).plain(torch.full((2, 256), 1e30) * torch.tensor([1.0, -1.0]).repeat(128))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_have_ggml_numbers_and_sizes(name: str) -> None:
    kind = GGMLQuantizationType[block(name).ggml_name]
    assert kind.value == block(name).ggml_type
    assert GGML_QUANT_SIZES[kind] == (block(name).span, block(name).block_bytes)


def ggml() -> ctypes.CDLL:
    """ggml's own encoders and decoders, from llama-cpp-python."""
    llama_cpp = pytest.importorskip("llama_cpp")
    (library,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("case", [name for name in CORPUS if name not in ("numbers near 1e-45",)])
def test_q8_k_is_that_of_ggml(case: str) -> None:
    """Its bytes, and its numbers for any bytes (ggml-quants.c); where 127 / w overflows its codes are undefined."""
    library, w = ggml(), CORPUS[case].contiguous()
    count = ctypes.c_int64(w.numel())
    theirs = torch.zeros(w.shape[0], w.shape[1] // 256 * 292, dtype=torch.uint8)
    library.quantize_row_q8_K_ref(ctypes.c_void_p(w.data_ptr()), ctypes.c_void_p(theirs.data_ptr()), count)
    assert torch.equal(plain(w, "q8_k"), theirs)
    numbers = torch.empty_like(w)
    library.dequantize_row_q8_K(ctypes.c_void_p(theirs.data_ptr()), ctypes.c_void_p(numbers.data_ptr()), count)
    assert torch.equal(QTensor.from_arrays(FORMATS["q8_k"], {"blocks": theirs}, tuple(w.shape)).dequantize(), numbers)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_plain_q8_k_refuses_what_is_not_finite(bad: float) -> None:
    w = torch.where(torch.arange(512) == 300, bad, 1.0)[None]
    with pytest.raises(FormatError, match="1 of 512 weights are NaN or Inf"):
        block("q8_k").plain(w)


def test_q8_k_has_ggml_s_number_and_size() -> None:
    kind = GGMLQuantizationType[block("q8_k").ggml_name]
    assert kind.value == block("q8_k").ggml_type
    assert GGML_QUANT_SIZES[kind] == (block("q8_k").span, block("q8_k").block_bytes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 172])
def test_bit_streams_equal_compressed_tensors(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    ours = pack_bits(codes, bits)
    assert torch.equal(ours, pack_to_int32(signed, bits))
    assert torch.equal(unpack_bits(ours, bits, columns), codes)
    assert torch.equal(unpack_from_int32(ours, bits, torch.Size((5, columns))), signed)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_integers_equal_compressed_tensors_packing(bits: int) -> None:
    format = FORMATS[f"int{bits}-g32"]
    w = normal(6, 128)
    codes = format.round(w, format.fit(w))
    assert torch.equal(format.pack(codes, format.fit(w))["packed"], pack_to_int32(codes, bits))


def test_fp4_rounds_like_compressed_tensors() -> None:
    """At scale 1, on a grid of all ties and their neighbours."""
    middles = torch.arange(-26, 27) / 4
    w = torch.cat([middles, middles + 1e-3, middles - 1e-3])[None, :].clamp(-6, 6)
    w = torch.cat([w, torch.full((1, -w.shape[1] % 32), 6.0)], 1)
    expected = FP4_E2M1_DATA.cast_to_fp4(w.clone())
    for name, params in (
        ("mxfp4", {"exponent": torch.full((1, w.shape[1] // 32), 127.0)}),
        ("nvfp4", {"scale": torch.ones(1, w.shape[1] // 16), "global_scale": torch.ones(1, 1)}),
    ):
        format = FORMATS[name]
        codes = format.round(w, params)
        assert torch.equal(format.decode(codes, params), expected)
        packed = format.pack(codes, params)["packed"]
        assert torch.equal(unpack_fp4_from_uint8(packed, 1, w.shape[1], torch.float32), expected)
        # The sign of what rounds to zero is lost in compressed-tensors' cast, so only the others have one encoding.
        kept = torch.where(expected == 0, 6.0, expected)
        assert torch.equal(format.pack(format.round(kept, params), params)["packed"], pack_fp4_to_uint8(kept))


@pytest.mark.parametrize(("name", "dtype"), [("fp8-e4m3", torch.float8_e4m3fn), ("fp8-e5m2", torch.float8_e5m2)])
def test_fp8_is_torchs(name: str, dtype: torch.dtype) -> None:
    format, peak = FORMATS[name], torch.finfo(dtype).max
    w = torch.cat([normal(1, 500) * 10, torch.tensor([[peak, -peak, 0.0, 1e-9]])], 1)
    params = format.fit(w)
    assert params["scale"].item() == 1
    assert torch.equal(format.decode(format.round(w, params), params), w.to(dtype).float())
    assert format.levels is not None
    assert format.levels[-1] == peak
    assert len(format.levels) == 256 - {"fp8-e4m3": 3, "fp8-e5m2": 9}[name]  # NaN, Inf and the second zero


def test_nf4_table_is_the_papers_construction() -> None:
    """Dettmers et al. 2023, appendix E: quantiles of a normal distribution at evenly spaced probabilities.

    Eight on the positive side and seven on the negative one, from 1/2 to δ = (1 − 1/32 + 1 − 1/30) / 2 = 0.9677083,
    and a zero; divided by the largest.
    """
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    assert offset == pytest.approx(0.9677083, abs=1e-7)

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(offset, 0.5, count, dtype=torch.float64)[:-1])

    table = torch.cat([quantiles(9), torch.zeros(1, dtype=torch.float64), -quantiles(8)]).sort().values
    # The published table was computed in float32, ndtri included, so a few of its last digits are off.
    torch.testing.assert_close((table / table.max()).float(), torch.tensor(NF4), rtol=0, atol=4e-7)
