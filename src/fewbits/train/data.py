"""What a Trainer is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


class Packed(Dataset[dict[str, Tensor]]):
    """Windows of tokens, ids [n, T]. labels: whether they are targets too, for models that compute their own loss."""

    def __init__(self, ids: Tensor, *, labels: bool = False) -> None:
        self.ids, self._labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids} if self._labels else {"input_ids": ids}
