"""GGUF's blocks of 32 with one scale: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 (ggml-quants.c; layout in ggml-common.h).

    Q8_0   d·q           q −128…127    2 + 32 bytes      8.5 bits a weight
    Q5_1   d·q + m       q 0…31        2 + 2 + 4 + 16    6
    Q5_0   d·(q − 16)    q 0…31        2 + 4 + 16        5.5
    Q4_1   d·q + m       q 0…15        2 + 2 + 16        5
    Q4_0   d·(q − 8)     q 0…15        2 + 16            4.5

d and m are FP16. Nibble j of a block holds code j in its low half and code j + 16 in its high half; the fifth bits of
Q5 stand apart, bit j of a 32-bit word for code j.

`plain` gives the reference encoder's codes (ggml's quantize_row_*_ref, and gguf-py's), which are rounded against d
before it is stored as FP16. `fit` and `round` use the stored d, which is never worse, and that is what every method but
plain rounding does. d may be negative in Q4_0 and Q5_0: it points the code without a mirror image at the largest
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.formats._bits import pack_bits, unpack_bits
from fewbits.formats._blocks import Block, from_half_bytes, half_bytes
from fewbits.formats._search import best_affine, best_scale, inverse
from fewbits.formats.base import Params, exactly


def _stored(**params: Tensor) -> Params:
    """Scales and offsets as their FP16 bytes will hold them."""
    return {name: p.to(torch.float16).float() for name, p in params.items()}


@dataclass(frozen=True)
class _Nibbled(Block):
    """Blocks whose codes are nibbles, with or without a fifth bit. Codes are unsigned (uint8)."""

    bits: ClassVar[int]

    @property
    def cells(self) -> str:
        return self.bits * "I"

    @property
    def highest(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def code_fields(self, codes: Tensor) -> dict[str, Tensor]:
        nibbles = codes & 0xF if self.bits == 5 else codes
        low, high = nibbles.chunk(2, dim=-1)
        fields = {"qs": low | (high << 4)}
        return fields | {"qh": pack_bits(codes >> 4, 1).view(torch.uint8)} if self.bits == 5 else fields

    def codes_from(self, fields: Mapping[str, Tensor]) -> Tensor:
        qs = fields["qs"]
        codes = torch.cat([qs & 0xF, qs >> 4], dim=-1)
        if self.bits == 5:
            codes |= unpack_bits(fields["qh"].view(torch.int32), 1, self.group) << 4
        return codes


@dataclass(frozen=True)
class _Centred(_Nibbled):
    """d·(q − 2^(b−1)): Q4_0 and Q5_0. Param: scale."""

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def levels(self) -> Tensor:
        return torch.arange(-self.zero, self.zero, dtype=torch.float32)

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        start = self._reference_scale(x)
        plain = _stored(scale=start)
        if not search:
            return plain
        reach = [1.06 - 0.04 * i for i in range(10)]
        best = best_scale(x, start, [*reach, *(-f for f in reach)], self._nearest, importance)
        return self.least_error(x, [plain, _stored(scale=best)], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        q = (x * inverse(params["scale"])).round_().add_(self.zero)
        return q.clamp_(0, self.highest).to(torch.uint8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float().sub_(self.zero).mul_(params["scale"])

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return {"scale": exactly(scale, torch.float16, f"{self.name}: a scale")}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return _stored(**{name: p * factor for name, p in params.items()})

    def plain_groups(self, x: Tensor) -> tuple[Tensor, Params]:
        scale = self._reference_scale(x)
        q = (x * inverse(scale).unsqueeze(-1)).add_(self.zero + 0.5)
        return q.clamp_(0, self.highest).to(torch.uint8), _stored(scale=scale)

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"d": half_bytes(params["scale"])} | self.code_fields(codes)

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        return self.codes_from(fields), {"scale": from_half_bytes(fields["d"])}

    def _reference_scale(self, x: Tensor) -> Tensor:
        """The weight of largest magnitude becomes code 0; at a tie the first one decides, as in the reference."""
        low, high = x.amin(-1), x.amax(-1)
        peak = torch.where(high > -low, high, low)
        tie = high == -low
        tied = x[tie]
        peak[tie] = tied.gather(-1, tied.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return peak / -self.zero

    def _nearest(self, t: Tensor) -> Tensor:
        return t.round_().clamp_(-self.zero, self.zero - 1)


@dataclass(frozen=True)
class _Offset(_Nibbled):
    """d·q + m: Q4_1 and Q5_1. Params: scale, offset."""

    @property
    def levels(self) -> Tensor:
        return torch.arange(self.highest + 1, dtype=torch.float32)

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        scale, offset = self._reference_range(x)
        plain = _stored(scale=scale, offset=offset)
        if not search:
            return plain
        factors = [1.05 - 0.05 * i for i in range(10)]
        scale, offset = best_affine(x, offset, x.amax(-1), self.highest, factors, importance)
        return self.least_error(x, [plain, _stored(scale=scale, offset=offset)], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        q = (x - params["offset"]).mul_(inverse(params["scale"])).round_()
        return q.clamp_(0, self.highest).to(torch.uint8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float().mul_(params["scale"]).add_(params["offset"])

    def offset_at(self, params: Params) -> Tensor:
        return params["offset"]

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        given = {"scale": scale, "offset": lowest}
        return {key: exactly(param, torch.float16, f"{self.name}: its {key}") for key, param in given.items()}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return _stored(**{name: p * factor for name, p in params.items()})

    def plain_groups(self, x: Tensor) -> tuple[Tensor, Params]:
        scale, offset = self._reference_range(x)
        q = (x - offset.unsqueeze(-1)).mul_(inverse(scale).unsqueeze(-1)).add_(0.5)
        return q.clamp_(0, self.highest).to(torch.uint8), _stored(scale=scale, offset=offset)

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"d": half_bytes(params["scale"]), "m": half_bytes(params["offset"])} | self.code_fields(codes)

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        params = {"scale": from_half_bytes(fields["d"]), "offset": from_half_bytes(fields["m"])}
        return self.codes_from(fields), params

    def _reference_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = x.amin(-1)
        return (x.amax(-1) - low) / self.highest, low


@dataclass(frozen=True)
class Q8_0(Block):
    """d·q with signed bytes. Codes int8; param: scale."""

    fields = (("d", 2), ("qs", 32))
    ggml_type = 8
    ggml_name = "Q8_0"
    summary = "GGUF: 32 signed bytes and a scale"

    @property
    def cells(self) -> str:
        return "S" + 7 * "I"

    @property
    def levels(self) -> Tensor:
        return torch.arange(-128, 128, dtype=torch.float32)

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        start = self._reference_scale(x)
        plain = _stored(scale=start)
        if not search:
            return plain
        factors = [1.01 - 0.005 * i for i in range(8)]
        best = best_scale(x, start, factors, lambda t: t.round_().clamp_(-128, 127), importance)
        return self.least_error(x, [plain, _stored(scale=best)], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return (x * inverse(params["scale"])).round_().clamp_(-128, 127).to(torch.int8)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float().mul_(params["scale"])

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return {"scale": exactly(scale, torch.float16, f"{self.name}: a scale")}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return _stored(**{name: p * factor for name, p in params.items()})

    def plain_groups(self, x: Tensor) -> tuple[Tensor, Params]:
        scale = self._reference_scale(x)
        t = x * inverse(scale).unsqueeze(-1)
        # C's roundf: ties go away from zero. t is at most 127 but for rounding, so no clamp is needed.
        return t.add_(t.sign(), alpha=0.5).to(torch.int8), _stored(scale=scale)

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"d": half_bytes(params["scale"]), "qs": codes.view(torch.uint8)}

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        return fields["qs"].view(torch.int8), {"scale": from_half_bytes(fields["d"])}

    def _reference_scale(self, x: Tensor) -> Tensor:
        return x.abs().amax(-1) / 127


@dataclass(frozen=True)
class Q4_0(_Centred):
    """Four bits around zero."""

    fields = (("d", 2), ("qs", 16))
    ggml_type = 2
    ggml_name = "Q4_0"
    bits = 4
    summary = "GGUF: 32 nibbles and a scale"


@dataclass(frozen=True)
class Q4_1(_Offset):
    """Four bits from a minimum."""

    fields = (("d", 2), ("m", 2), ("qs", 16))
    ggml_type = 3
    ggml_name = "Q4_1"
    bits = 4
    summary = "GGUF: 32 nibbles, a scale and a minimum"


@dataclass(frozen=True)
class Q5_0(_Centred):
    """Five bits around zero."""

    fields = (("d", 2), ("qh", 4), ("qs", 16))
    ggml_type = 6
    ggml_name = "Q5_0"
    bits = 5
    summary = "GGUF: 32 five-bit codes and a scale"


@dataclass(frozen=True)
class Q5_1(_Offset):
    """Five bits from a minimum."""

    fields = (("d", 2), ("m", 2), ("qh", 4), ("qs", 16))
    ggml_type = 7
    ggml_name = "Q5_1"
    bits = 5
    summary = "GGUF: 32 five-bit codes, a scale and a minimum"


GGUF_LEGACY = (Q8_0(), Q5_1(), Q5_0(), Q4_1(), Q4_0())
