"""MXFP4 as GGUF stores it: each group's scale beside its codes (block_mxfp4 in ggml-common.h). The numbers are MxFp4's.

It is no format of its own, only other bytes, so it is not in the registry: GGUF files say `mxfp4` and mean this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fewbits.formats._blocks import Block, fold, unfold
from fewbits.formats.base import Params
from fewbits.formats.minifloat import MxFp4

NUMBERS = MxFp4()


@dataclass(frozen=True)
class MxFp4Blocks(Block):
    """The exponent's byte, then 32 nibbles, codes j and j + 16 in one byte."""

    fields = (("e", 1), ("qs", 16))
    ggml_type = 39
    ggml_name = "MXFP4"
    summary = MxFp4.summary

    @property
    def cells(self) -> str:
        return NUMBERS.cells

    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        return NUMBERS.fit_groups(x, importance, search=search)

    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return NUMBERS.round_at(x, params)

    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return NUMBERS.decode_at(codes, params)

    def scale_at(self, params: Params) -> Tensor:
        return NUMBERS.scale_at(params)

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return NUMBERS.placed(scale, lowest)

    def plain_groups(self, x: Tensor) -> tuple[Tensor, Params]:
        params = NUMBERS.fit_groups(x, None, search=False)
        return NUMBERS.round_at(x, {key: p.unsqueeze(-1) for key, p in params.items()}), params

    def to_fields(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"e": params["exponent"].to(codes.dtype).unsqueeze(-1), "qs": fold(codes, 16, 4)}

    def from_fields(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Params]:
        return unfold(fields["qs"], 16, 4), {"exponent": fields["e"].squeeze(-1).float()}
