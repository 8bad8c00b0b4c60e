"""GGUF's four bits of uneven levels: IQ4_NL and IQ4_XS (ggml-quants.c; layouts in ggml-common.h).

              number      a scale for     bytes            bits a weight
    IQ4_NL    d·v(q)      32              18 for 32        4.5
    IQ4_XS    d·s·v(q)    32, 6 bits      136 for 256      4.25

The sixteen levels v lie closer together near zero, where most weights are, and reach a little further on the negative
side; so scales may be negative, to point that side where the largest weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewbits.formats._blocks import Block, fold, from_half_bytes, half_bytes, unfold
from fewbits.formats._search import best_scale, inverse
from fewbits.formats._superblocks import SPAN, ScaledBlocks, signed_peak, stored
from fewbits.formats.base import Params, exactly

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The sixteen levels (kvalues_iq4nl)."""


class _Uneven:
    """What both are: one of sixteen levels."""

    @property
    def cells(self) -> str:
        return "IIII"

    @property
    def levels(self) -> Tensor:
        return torch.tensor(IQ4, dtype=torch.float32)


@dataclass(frozen=True)
class IQ4_XS(_Uneven, ScaledBlocks):
    """Sixteen uneven levels. Codes are uint8."""

    fields = (("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128))
    ggml_type = 23
    ggml_name = "IQ4_XS"
    instead = "iq4_nl"
    integers = (-32, 31)
    summary = "GGUF: 4-bit codes of uneven levels, 6-bit scales for 32, a factor for 256"

    def nearest(self, t: Tensor) -> Tensor:
        return self.level_of(self.codes_of(t))

    def codes_of(self, t: Tensor) -> Tensor:
        return _codes(t)

    def level_of(self, codes: Tensor) -> Tensor:
        return _levels(codes)

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        steps = (params["steps"] + 32).to(torch.uint8)
        pairs = (steps & 0xF).unflatten(-1, (4, 2))
        return {
            "d": half_bytes(params["factor"][..., 0]),
            "scales_h": fold(steps >> 4, 1, 2),
            "scales_l": pairs[..., 0] | pairs[..., 1] << 4,
            "qs": fold(codes.unflatten(-1, (-1, SPAN)), 16, 4),
        }

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        low = torch.stack([fields["scales_l"] & 0xF, fields["scales_l"] >> 4], dim=-1).flatten(-2)
        steps = (low | unfold(fields["scales_h"], 1, 2) << 4).float().sub_(32)
        factor = from_half_bytes(fields["d"]).unsqueeze(-1)
        return unfold(fields["qs"], 16, 4), {"factor": factor, "steps": steps}


def _codes(t: Tensor) -> Tensor:
    """How many midpoints between levels lie below each number."""
    codes = torch.zeros_like(t, dtype=torch.uint8)
    for low, high in pairwise(IQ4):
        codes += (t > (low + high) / 2).view(torch.uint8)
    return codes


def _levels(codes: Tensor) -> Tensor:
    table = torch.tensor(IQ4, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


@dataclass(frozen=True)
class IQ4_NL(_Uneven, Block):
    """Sixteen uneven levels and a scale. Codes are uint8; param: scale."""

    fields = (("d", 2), ("qs", 16))
    ggml_type = 20
    ggml_name = "IQ4_NL"
    summary = "GGUF: 32 codes of uneven levels and a scale"

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        start = signed_peak(x) / IQ4[0]
        plain = {"scale": stored(start)}
        if not search:
            return plain
        reach = [1.08 - 0.05 * i for i in range(10)]
        best = best_scale(x, start, [*reach, *(-f for f in reach)], lambda t: _levels(_codes(t)), importance)
        return self.least_error(x, [plain, {"scale": stored(best)}], importance)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return _codes(x * inverse(params["scale"]))

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return _levels(codes).mul_(params["scale"])

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return {"scale": exactly(scale, torch.float16, f"{self.name}: a scale")}

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return {"scale": stored(params["scale"] * factor)}

    def plain_groups(self, x: Tensor) -> tuple[Tensor, Params]:
        """The scale from the range: ggml's own encoder searches, and is not copied."""
        params = self.fit_groups(x, None, search=False)
        return self.round_at(x, {"scale": params["scale"].unsqueeze(-1)}), params

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"d": half_bytes(params["scale"]), "qs": fold(codes, 16, 4)}

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        return unfold(fields["qs"], 16, 4), {"scale": from_half_bytes(fields["d"])}


GGUF_IQ = (IQ4_NL(), IQ4_XS())
