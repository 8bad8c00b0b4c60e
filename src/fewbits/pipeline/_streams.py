"""The hidden states in front of the next block: of calibration windows, of the original, and of held-out windows."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fewbits.engine import LayeredModel
from fewbits.pipeline._activations import Activations

BATCH = 1024  # tokens that run through a block at a time: no slower than more, and its wide layers take less memory


class Streams:
    """The hidden states in front of the next block, of calibration windows ids [n, T].

    quantized: behind quantized blocks; original: behind original ones, None where nobody asks for it.
    """

    def __init__(
        self, model: LayeredModel, ids: Tensor, *, folder: Path, limit: int, original: bool, held: Tensor | None = None
    ) -> None:
        self.batch = max(1, BATCH // ids.shape[1])
        self.ids = ids
        spill = 4 * (1 + original) * ids.numel() * model.hidden_size > limit
        files = [folder / f"{name}.states" if spill else None for name in ("quantized", "original")]
        with model.outside():
            self.quantized = embedded(model, ids, self.batch, files[0])
            self.held = None if held is None else embedded(model, held, self.batch)
        with model.original():
            self.original = embedded(model, ids, self.batch, files[1]) if original else None

    def close(self) -> None:
        """Free everything, on disk too."""
        for stream in (self.quantized, self.original, self.held):
            if stream is not None:
                stream.close()


def embedded(model: LayeredModel, ids: Tensor, batch: int, file: Path | None = None) -> Activations:
    """What the first block reads of windows ids [n, T]."""
    windows, length = ids.shape
    stream = Activations(windows, length, model.hidden_size, file)
    for start in range(0, len(ids), batch):
        stream.put(start, model.embed(ids[start : start + batch]))
    return stream
