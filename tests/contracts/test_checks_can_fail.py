"""Formats that break a promise on purpose: the check that should notice does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from format_checks import CHECKS
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats import Affine, ArraySpec, Params
from fewbits.formats.base import Arrays


@dataclass(frozen=True)
class Sound(Affine):
    bits: int = 4
    group: int = 32


class SaysFewerBytes(Sound):
    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return super().arrays(shape) | {"scale": ArraySpec(torch.uint8, self.groups(shape))}


class LosesPrecisionInPacking(Sound):
    def stored(self, scale: Tensor) -> Tensor:
        return scale


class LosesTheLastCode(Sound):
    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return super().pack(codes.clamp(max=6), params)


class RoundsDown(Sound):
    def round_at(self, x: Tensor, params: Params) -> Tensor:
        return (x / params["scale"]).floor().clamp(-8, 7).to(torch.int8)


class MovesZero(Sound):
    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        return (codes + 0.5) * params["scale"]


class SearchesForTheWorst(Sound):
    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        params = super().fit_groups(x, importance, search=False)
        return {"scale": self.stored(params["scale"] * (1.3 if search else 1.0))}


class AcceptsNotANumber(Sound):
    def fit(self, w: Tensor, importance: Tensor | None = None, *, search: bool = False) -> Params:
        return super().fit(w.nan_to_num(0.0, 0.0, 0.0), importance, search=search)


class LetsPaddingCount(Sound):
    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        return {"scale": self.stored(x.abs().mean(-1) * (1 + x.shape[-2] / 100))}


class MixesRows(Sound):
    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        scale = super().fit_groups(x, importance, search=False)["scale"]
        return {"scale": scale.amax(-2, keepdim=True).expand_as(scale).contiguous()}


class MixesExperts(Sound):
    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        scale = super().fit_groups(x, importance, search=False)["scale"]
        return {"scale": scale.amax(0, keepdim=True).expand_as(scale).contiguous() if scale.dim() > 2 else scale}


class TakesTheNextGroupsColumn(Sound):
    def at_columns(self, params: Params, columns: Tensor) -> Params:
        return super().at_columns(params, (columns + 1).clamp(max=params["scale"].shape[-1] * 32 - 1))


class WritesIntoItsInput(Sound):
    def round(self, w: Tensor, params: Params) -> Tensor:
        return super().round(w.mul_(1.0001), params)


BREAKS = {
    "bytes": (SaysFewerBytes, LosesPrecisionInPacking),
    "every_code_packs": (LosesTheLastCode,),
    "nearest": (RoundsDown,),
    "zeros": (MovesZero,),
    "search_never_hurts": (SearchesForTheWorst,),
    "not_finite_is_refused": (AcceptsNotANumber,),
    "ragged_tail": (LetsPaddingCount,),
    "rows": (MixesRows,),
    "experts": (MixesExperts,),
    "columns": (TakesTheNextGroupsColumn,),
    "input_is_not_changed": (WritesIntoItsInput,),
}
CASES = [(check, broken) for check, formats in BREAKS.items() for broken in formats]


@pytest.mark.parametrize(("check", "broken"), CASES)
def test_a_broken_promise_is_noticed(check: str, broken: type[Sound]) -> None:
    with pytest.raises((AssertionError, FormatError, pytest.fail.Exception)):
        CHECKS[check](broken())


@pytest.mark.parametrize("check", BREAKS)
def test_a_sound_format_passes_the_same_checks(check: str) -> None:
    CHECKS[check](Sound())
