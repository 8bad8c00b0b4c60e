"""What a Trainer is given."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


class Rows(Dataset[dict[str, Tensor]]):
    """Windows that know whether they are the same ones."""

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """SHA-256 of all windows in order, labels included."""
        found = hashlib.sha256()
        for index in range(len(self)):
            for name, values in self[index].items():
                found.update(name.encode() + values.numpy().tobytes())
        return found.hexdigest()


class Packed(Rows):
    """Windows of tokens, ids [n, T]. labels: whether they are targets too, for models that compute their own loss."""

    def __init__(self, ids: Tensor, *, labels: bool = False) -> None:
        self.ids, self._labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids} if self._labels else {"input_ids": ids}
