"""What was solved on calibration text, as the rest of the pipeline sees it: ready matrices, and a changed source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fewbits.checkpoint import Reader
from fewbits.formats import Float, QTensor
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._rotated import RotatedReader


class Overlay(Reader):
    """A checkpoint some of whose tensors are other ones: those that a transform rewrote and the plan keeps."""

    def __init__(self, reader: Reader, changed: Mapping[str, torch.Tensor]) -> None:
        self.path, self.config, self.entries = reader.path, reader.config, reader.entries
        self.changed = changed
        self.below = reader

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        if name not in self.changed:
            return self.below.read(name, rows)
        value = self.changed[name]
        return QTensor(Float(value.dtype), value if rows is None else value[rows], {})


def rewritten(reader: Reader, name: str) -> bool:
    """Whether a transform or a training made other numbers of a parameter of the source."""
    if isinstance(reader, Overlay):
        return name in reader.changed or rewritten(reader.below, name)
    return isinstance(reader, RotatedReader) and reader.rewritten(name)


class Solved:
    """The matrices that were solved on calibration text, read back from the journal's stages as they are asked for."""

    def __init__(self, journal: Journal, stages: Sequence[str], *, transformed: bool) -> None:
        self._journal = journal
        self._places = {
            name: (stage, index, error) for stage in stages for name, (index, error) in journal.index(stage).items()
        }
        self.transformed = transformed
        self.scales = {name: scale for stage in stages for name, scale in journal.scales(stage).items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def error(self, name: str) -> float:
        return self._places[name][2]

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        stage, index, _ = self._places[name]
        return self._journal.read(stage, index, name, rows)
