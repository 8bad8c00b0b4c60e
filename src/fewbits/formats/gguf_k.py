"""GGUF's K-quants: super-blocks of 256 with two levels of scales (ggml-quants.c; layouts in ggml-common.h).

           number              codes      a sub-block     its scale, its minimum    bytes   bits a weight
    Q2_K   d·s·q − k·m         q 0…3      16              4 bits each               84      2.625
    Q3_K   d·s·q               q −4…3     16              s −32…31                  110     3.4375
    Q4_K   d·s·q − k·m         q 0…15     32              6 bits each               144     4.5
    Q5_K   d·s·q − k·m         q 0…31     32              6 bits each               176     5.5
    Q6_K   d·s·q               q −32…31   16              s −128…127                210     6.5625
    Q8_K   d·q                 q −128…127                                           292     9.125

How scales are found is in `_superblocks`. Codes are uint8, those around zero counted from the lowest one; Q8_K's int8.

Q8_K has one scale, in FP32, and the sums of each 16 codes beside them, with which a product of codes takes the minima
of the other side into account. llama.cpp rounds the *inputs* of K-quantized matrices to it while it computes, and has
no kernels for weights in it: such GGUF files are read here, and not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.formats._blocks import Block, fold, from_half_bytes, half_bytes, unfold
from fewbits.formats._search import best_scale, inverse
from fewbits.formats._superblocks import SPAN, EvenBlocks, OffsetBlocks
from fewbits.formats.base import Params

SUMMED = 16  # codes of Q8_K whose sum is stored


@dataclass(frozen=True)
class Q3_K(EvenBlocks):
    """Three bits around zero."""

    fields = (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2))
    ggml_type = 11
    ggml_name = "Q3_K"
    instead = "iq4_nl"
    bits = 3
    integers = (-32, 31)
    summary = "GGUF: 3-bit codes, 6-bit scales for 16, a factor for 256"

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        codes = codes.unflatten(-1, (-1, SPAN))
        steps = (params["steps"] + 32).to(torch.uint8)
        low = fold(steps & 0xF, 8, 4)
        return {
            "hmask": fold(codes >> 2, 32, 1),
            "qs": fold(codes & 3, 32, 2),
            "scales": torch.cat([low, fold(steps >> 4, 4, 2)], dim=-1),
            "d": half_bytes(params["factor"][..., 0]),
        }

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        codes = unfold(fields["qs"], 32, 2) | unfold(fields["hmask"], 32, 1) << 2
        low, high = fields["scales"].split((8, 4), dim=-1)
        steps = (unfold(low, 8, 4) | unfold(high, 4, 2) << 4).float().sub_(32)
        return codes, {"factor": from_half_bytes(fields["d"]).unsqueeze(-1), "steps": steps}


@dataclass(frozen=True)
class Q6_K(EvenBlocks):
    """Six bits around zero."""

    fields = (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2))
    ggml_type = 14
    ggml_name = "Q6_K"
    instead = "q8_0"
    bits = 6
    integers = (-128, 127)
    summary = "GGUF: 6-bit codes, 8-bit scales for 16, a factor for 256"

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        codes = codes.unflatten(-1, (-1, SPAN))
        return {
            "ql": fold(codes & 0xF, 64, 4),
            "qh": fold(codes >> 4, 32, 2),
            "scales": params["steps"].to(torch.int8).view(torch.uint8),
            "d": half_bytes(params["factor"][..., 0]),
        }

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        codes = unfold(fields["ql"], 64, 4) | unfold(fields["qh"], 32, 2) << 4
        factor = from_half_bytes(fields["d"]).unsqueeze(-1)
        return codes, {"factor": factor, "steps": fields["scales"].view(torch.int8).float()}


@dataclass(frozen=True)
class Q2_K(OffsetBlocks):
    """Two bits from a minimum."""

    group: int = 16

    fields = (("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2))
    ggml_type = 10
    ggml_name = "Q2_K"
    instead = "iq4_nl"
    bits = 2
    integers = (0, 15)
    summary = "GGUF: 2-bit codes, 4-bit scales and minima for 16, two factors for 256"

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        steps, minima = (params[key].to(torch.uint8) for key in ("steps", "minimum_steps"))
        return {
            "scales": steps | minima << 4,
            "qs": fold(codes.unflatten(-1, (-1, SPAN)), 32, 2),
            "d": half_bytes(params["factor"][..., 0]),
            "dmin": half_bytes(params["minimum_factor"][..., 0]),
        }

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        scales = fields["scales"]
        return unfold(fields["qs"], 32, 2), {
            "factor": from_half_bytes(fields["d"]).unsqueeze(-1),
            "steps": (scales & 0xF).float(),
            "minimum_factor": from_half_bytes(fields["dmin"]).unsqueeze(-1),
            "minimum_steps": (scales >> 4).float(),
        }


@dataclass(frozen=True)
class _SixBit(OffsetBlocks):
    """Scales and minima of 6 bits."""

    integers = (0, 63)

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        codes = codes.unflatten(-1, (-1, SPAN))
        fields = _six_bit_fields(params) | {"qs": fold(codes & 0xF, 32, 4)}
        return fields if self.bits == 4 else fields | {"qh": fold(codes >> 4, 32, 1)}

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        codes = unfold(fields["qs"], 32, 4)
        return codes if self.bits == 4 else codes | unfold(fields["qh"], 32, 1) << 4, _six_bit_params(fields)


@dataclass(frozen=True)
class Q4_K(_SixBit):
    """Four bits from a minimum."""

    fields = (("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128))
    ggml_type = 12
    ggml_name = "Q4_K"
    instead = "q5_0"
    bits = 4
    summary = "GGUF: 4-bit codes, 6-bit scales and minima for 32, two factors for 256"


@dataclass(frozen=True)
class Q5_K(_SixBit):
    """Five bits from a minimum."""

    fields = (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128))
    ggml_type = 13
    ggml_name = "Q5_K"
    instead = "q5_1"
    bits = 5
    summary = "GGUF: 5-bit codes, 6-bit scales and minima for 32, two factors for 256"


@dataclass(frozen=True)
class Q8_K(Block):
    """Signed bytes under one FP32 scale, with their sums. Codes int8; param: scale, which may be negative."""

    group: int = SPAN

    fields = (("d", 4), ("qs", SPAN), ("bsums", 2 * SPAN // SUMMED))
    ggml_type = 15
    ggml_name = "Q8_K"
    runs = False
    summary = "GGUF: 256 signed bytes, their sums and a scale"
    purpose = "what llama.cpp rounds inputs of K-quants to, for studying it; 8-bit weights are Q8_0 there"

    @property
    def cells(self) -> str:
        return "S" + 7 * "I"

    @property
    def levels(self) -> Tensor:
        return torch.arange(-128, 128, dtype=torch.float32)

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        plain = x.abs().amax(-1) / 127
        if not search:
            return {"scale": plain}
        reach = [1.01 - 0.005 * i for i in range(8)]
        best = best_scale(x, plain, reach, lambda t: t.round_().clamp_(-128, 127), importance)
        return self.least_error(x, [{"scale": plain}, {"scale": best}], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return (x * inverse(params["scale"])).round_().clamp_(-128, 127).to(torch.int8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float().mul_(params["scale"])

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return {"scale": scale}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return {"scale": params["scale"] * factor}

    def plain_groups(self, x: Tensor) -> tuple[Tensor, Params]:
        """The number of largest magnitude, the first of several, becomes −127."""
        peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        # Divided as tensors: torch takes a number divided by a tensor for a product with the reciprocal.
        per_scale = torch.full_like(peak, -127).div_(peak)
        per_scale = torch.where(per_scale.isinf(), 0.0, per_scale)  # zeros, or where ggml's codes are undefined
        scale = torch.where(peak.isfinite(), inverse(per_scale), peak).squeeze(-1)
        return (x * per_scale).round_().clamp_(-128, 127).to(torch.int8), {"scale": scale}

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        sums = codes.unflatten(-1, (-1, SUMMED)).sum(-1, dtype=torch.int16)
        return {
            "d": params["scale"].unsqueeze(-1).view(torch.uint8),
            "qs": codes.view(torch.uint8),
            "bsums": sums.view(torch.uint8),
        }

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        return fields["qs"].view(torch.int8), {"scale": fields["d"].view(torch.float32).squeeze(-1)}


def _six_bit_fields(params: Params) -> dict[str, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes: the first four of each in a byte's low bits, above them the
    high bits of the last four, whose low nibbles share the last four bytes.
    """
    steps, minima = (params[key].to(torch.uint8) for key in ("steps", "minimum_steps"))
    (s, late_s), (m, late_m) = steps.chunk(2, dim=-1), minima.chunk(2, dim=-1)
    packed = [s | (late_s >> 4) << 6, m | (late_m >> 4) << 6, late_s & 0xF | (late_m & 0xF) << 4]
    factors = {"d": params["factor"], "dmin": params["minimum_factor"]}
    return {"scales": torch.cat(packed, dim=-1)} | {key: half_bytes(p[..., 0]) for key, p in factors.items()}


def _six_bit_params(fields: Mapping[str, Tensor]) -> Params:
    s, m, late = fields["scales"].chunk(3, dim=-1)
    steps = torch.cat([s & 0x3F, late & 0xF | (s >> 6) << 4], dim=-1)
    minima = torch.cat([m & 0x3F, late >> 4 | (m >> 6) << 4], dim=-1)
    return {
        "factor": from_half_bytes(fields["d"]).unsqueeze(-1),
        "steps": steps.float(),
        "minimum_factor": from_half_bytes(fields["dmin"]).unsqueeze(-1),
        "minimum_steps": minima.float(),
    }


GGUF_K = (Q8_K(), Q6_K(), Q5_K(), Q4_K(), Q3_K(), Q2_K())
