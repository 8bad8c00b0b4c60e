"""Integers whose groups are not neighbours: what GPTQ makes where it takes the columns in the order of their inputs.

With `desc_act` GPTQ rounds the columns with the largest inputs first and gives every `group` of them, in that order,
one scale. Afterwards the columns lie where they were, so a list says which group each of them is in: `order`, int32
[K], GPTQ's `g_idx`. It is the same for all rows, hence 32 bits a column. The other params are those of the integers.

Other people's checkpoints have it, and it is read, run and written back as it is. Nothing here makes one: `fit` is the
integers' own, with neighbours in a group, so `order` is that of the plain format and the bytes for it are wasted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.formats.affine import Affine
from fewbits.formats.base import Arrays, ArraySpec, Format, Params


@dataclass(frozen=True)
class ActOrder(Format):
    """Codes and params of `integers`, [N, K] and [N, G], and `order`: the group of each column."""

    integers: Affine

    summary = "integers whose groups are listed column by column"
    purpose = "what GPTQ's desc_act has made"
    columnwise = False

    @property
    def name(self) -> str:
        return f"{self.integers.name}-actorder"

    @property
    def cells(self) -> str:
        return self.integers.cells

    @property
    def levels(self) -> Tensor:
        return self.integers.levels

    @property
    def rowwise(self) -> bool:
        """No: every row depends on the list."""
        return False

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if len(shape) != 2:
            raise FormatError(f"{self.name}: {list(shape)} has several matrices, and the list is of one; split it")

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return self.integers.arrays(shape) | {"order": ArraySpec(torch.int32, shape[-1:])}

    def fit(self, w: Tensor, importance: Tensor | None = None, *, search: bool = False) -> Params:
        self.check(tuple(w.shape))
        params = self.integers.fit(w, importance, search=search)
        return {**params, "order": self.neighbours(w.shape[-1])}

    def neighbours(self, in_features: int) -> Tensor:
        """The order in which groups are neighbours."""
        group = self.integers.group
        return torch.arange(in_features, dtype=torch.int32) // (group if isinstance(group, int) else in_features)

    def round(self, w: Tensor, params: Params) -> Tensor:
        return self.integers.round_at(w.float(), self._by_column(params))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.integers.decode_at(codes, self._by_column(params))

    def pack(self, codes: Tensor, params: Params) -> Arrays:
        return self.integers.pack(codes, params) | {"order": params["order"]}

    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        codes, params = self.integers.unpack(arrays, shape)
        return codes, {**params, "order": arrays["order"]}

    def _by_column(self, params: Params) -> Params:
        """Params as if every column were a group, [N, K]."""
        order = params["order"].long()
        return {key: param[..., order] for key, param in params.items() if key != "order"}
