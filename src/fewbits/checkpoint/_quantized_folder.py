"""What kinds share that are safetensors folders whose configuration says how matrices are quantized."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fewbits.checkpoint._arrays import CONFIG, read_json
from fewbits.checkpoint.activations import activation_trouble
from fewbits.checkpoint.base import Entry, Kind, Writer
from fewbits.checkpoint.huggingface import float_trouble, quantization_of
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import Float


class QuantizedFolder(Kind):
    """Recognised by its configuration; what stays in floating point is held as in any safetensors folder."""

    method: ClassVar[str]
    """`quant_method` of quantization_config, where that alone tells; else `recognises` is overridden."""

    def detect(self, path: Path) -> bool:
        try:
            return self.recognises(path)
        except CheckpointError:
            return False

    def recognises(self, path: Path) -> bool:
        """Whether the configuration names this kind. Raises CheckpointError where there is none to be read."""
        return quantization_of(read_json(path / CONFIG)).get("quant_method") == self.method

    def admits(self, entry: Entry) -> str | None:
        if isinstance(entry.format, Float):
            trouble = activation_trouble(entry)
            return f"{entry.name}: {trouble}" if trouble else float_trouble(entry)
        trouble = self.trouble(entry)
        return f"{entry.name}: {trouble}" if trouble else None

    @abstractmethod
    def trouble(self, entry: Entry) -> str | None:
        """Why this kind cannot hold a quantized entry, without its name; None if it can."""


class ReadFolder(QuantizedFolder):
    """One that fewbits reads and does not write."""

    written = False

    def admits(self, entry: Entry) -> str | None:
        return f"{entry.name}: {self.trouble(entry)}"

    def trouble(self, entry: Entry) -> str:
        return f"fewbits reads {self.name} folders and writes none; write compressed-tensors instead"

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        raise UnsupportedError(f"{path}: fewbits reads {self.name} folders and writes none; write compressed-tensors")
