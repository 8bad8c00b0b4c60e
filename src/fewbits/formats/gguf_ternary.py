"""GGUF's ternary blocks: TQ1_0 and TQ2_0, 256 weights −d, 0 or +d with one FP16 scale (layouts in ggml-common.h).

    TQ1_0    five trits a byte      54 bytes    1.6875 bits a weight
    TQ2_0    two bits each          66          2.0625

TQ1_0 keeps a byte's five trits as a fraction: with n = Σ trit·3^(4−i) the byte is ⌈256·n / 243⌉, and multiplying it by
3 over and over brings one trit after the other above 256. Its 256 weights are 32 · 5, then 16 · 5, then 4 · 4.

Scales are found as for `ternary`; `plain` gives the reference encoder's codes, whose scale is the largest magnitude,
because it is meant for weights that are ternary already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewbits.formats._blocks import Block, fold, from_half_bytes, half_bytes, unfold
from fewbits.formats._search import inverse
from fewbits.formats.base import Params
from fewbits.formats.ternary import Ternary

SPAN = 256
NUMBERS = Ternary(group=SPAN)
PARTS = ((0, 160, 5), (160, 240, 5), (240, 256, 4))  # first weight, end, trits a byte
STEPS = 243  # 3⁵


@dataclass(frozen=True)
class _TernaryBlock(Block):
    """Codes −1, 0, 1 (int8). Param: scale."""

    group: int = SPAN

    @property
    def cells(self) -> str:
        return NUMBERS.cells

    @property
    def levels(self) -> Tensor:
        return NUMBERS.levels

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        return NUMBERS.fit_groups(x, importance, search=search)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return NUMBERS.round_at(x, params)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return NUMBERS.decode_at(codes, params)

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return NUMBERS.placed(scale, lowest)

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return NUMBERS.rescaled(params, factor)

    def plain_groups(self, x: Tensor) -> tuple[Tensor, Params]:
        scale = x.abs().amax(-1)
        t = x * inverse(scale).unsqueeze(-1)
        return (t.sign() * (t.abs() >= 0.5)).to(torch.int8), {"scale": scale.to(torch.float16).float()}


@dataclass(frozen=True)
class TQ1_0(_TernaryBlock):
    """Five trits a byte."""

    fields = (("qs", 48), ("qh", 4), ("d", 2))
    ggml_type = 34
    ggml_name = "TQ1_0"
    instead = "q4_0"
    summary = "GGUF: 256 weights of −d, 0 or +d, five to a byte"

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        trits = (codes + 1).to(torch.int32)
        data = torch.cat([_fractions(trits[..., start:stop], each) for start, stop, each in PARTS], dim=-1)
        qs, qh = data.split((48, 4), dim=-1)
        return {"qs": qs, "qh": qh, "d": half_bytes(params["scale"])}

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        data = torch.cat([fields["qs"], fields["qh"]], dim=-1).to(torch.int32)
        ends = [0]
        for start, stop, each in PARTS:
            ends.append(ends[-1] + (stop - start) // each)
        parts = [_trits(data[..., a:b], each) for (a, b), (_, _, each) in zip(pairwise(ends), PARTS, strict=True)]
        return (torch.cat(parts, dim=-1) - 1).to(torch.int8), {"scale": from_half_bytes(fields["d"])}


@dataclass(frozen=True)
class TQ2_0(_TernaryBlock):
    """Two bits each: faster to decode."""

    fields = (("qs", 64), ("d", 2))
    ggml_type = 35
    ggml_name = "TQ2_0"
    instead = "q4_0"
    summary = "GGUF: 256 weights of −d, 0 or +d, two bits each"

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"qs": fold((codes + 1).to(torch.uint8), 32, 2), "d": half_bytes(params["scale"])}

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        codes = unfold(fields["qs"], 32, 2).to(torch.int8) - 1
        return codes, {"scale": from_half_bytes(fields["d"])}


def _fractions(trits: Tensor, each: int) -> Tensor:
    """Bytes of `each` trits; byte l holds trits l, l + bytes, l + 2·bytes …"""
    place = torch.tensor([81, 27, 9, 3, 1][:each], dtype=torch.int32, device=trits.device)
    number: Tensor = (trits.unflatten(-1, (each, -1)) * place.unsqueeze(-1)).sum(-2)
    return ((number * 256 + STEPS - 1) // STEPS).to(torch.uint8)


def _trits(data: Tensor, each: int) -> Tensor:
    power = torch.tensor([1, 3, 9, 27, 81][:each], dtype=torch.int32, device=data.device)
    found: Tensor = (((data.unsqueeze(-2) * power.unsqueeze(-1)) & 0xFF) * 3 >> 8).flatten(-2)
    return found


GGUF_TERNARY = (TQ1_0(), TQ2_0())
