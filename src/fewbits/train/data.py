"""What a Trainer is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


class Packed(Dataset[dict[str, Tensor]]):
    """Windows of tokens, ids [n, T]."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}
