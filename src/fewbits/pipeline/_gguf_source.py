"""A GGUF file as the Hugging Face checkpoint that it stands for: a reader in front of a reader.

Parameters have transformers' names and layout: rows out of their interleaving (of codes and scales as of numbers),
norms without the 1 that GGUF adds to Gemma's. So plans, methods and outputs need to know nothing of GGUF. (With w of 16
bits, 1 + w comes out of FP32 and goes back into it as it was; of a norm in FP32 with w < −1/2 the last bit may move, by
2⁻²⁵.)

A GGUF output takes over the file's own metadata and its tensors that are no parameter, instead of what fewbits would
make of the restored configuration. Beside the weights of a folder lie tokenizer and generation settings that say what
the metadata says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fewbits.checkpoint.base import Reader
from fewbits.checkpoint.gguf import GgufReader
from fewbits.checkpoint.gguf_parts import SPLIT_KEYS
from fewbits.engine.tiling import taken
from fewbits.engine.weights import restored_model
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import Float, QTensor
from fewbits.models import EMBEDDING, Restored, restored_tokenizer

OWNED = ("general.file_type", "general.quantization_version", *SPLIT_KEYS)
"""Keys that say how a file's tensors are stored, which is another matter in the output."""


class GgufSource(Reader):
    """The model of an open GGUF file.

    config: config.json of the model that computes what the file says. metadata: the file's, with its types, less what
    each output says for itself. extras: tensors that are part of the configuration elsewhere, float32 values by name.
    Raises UnsupportedError for an architecture or a tensor that is not among the families here.
    """

    def __init__(self, file: GgufReader) -> None:
        self.path = file.path
        self._file = file
        config, self._places = restored_model(file)
        for name, place in self._places.items():
            if place.added and not isinstance(file.entries[place.source].format, Float):
                raise UnsupportedError(
                    f"{file.path}: {place.source} is {file.entries[place.source].format}, and the 1 that GGUF adds to "
                    f"{name} cannot be taken from a quantized tensor; start from the original"
                )
        self.entries = {name: replace(file.entries[place.source], name=name) for name, place in self._places.items()}
        self.config: dict[str, Any] = config | {"dtype": self._dtype()}
        self.metadata = {key: value for key, value in file.typed.items() if key not in OWNED}
        others = file.entries.keys() - {place.source for place in self._places.values()}
        self.extras = {name: tuple(file.read(name).dequantize().tolist()) for name in sorted(others)}

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(f"{self.path}: holds no parameter {name}")
        q = self._ordered(place, self.entries[name].shape, rows)
        if not place.added:
            return q
        return QTensor(q.format, (q.codes.float() + place.added).to(q.codes.dtype), {})

    def exact(self, name: str) -> bool:
        """Whether nothing was lost by taking away what GGUF adds to a parameter."""
        place = self._places[name]
        stored, w = self._file.read(place.source).dequantize().double(), self.read(name).dequantize().double()
        return not place.added or torch.equal(w - place.added, stored)

    def digests(self, name: str) -> dict[str, str]:
        return self._file.digests(self._places[name].source)

    def _ordered(self, place: Restored, shape: tuple[int, ...], rows: slice | None) -> QTensor:
        """Rows of a parameter in transformers' order, read as one run of the stored ones that has them all."""
        order = place.row_order(shape[0]) if shape else None
        if order is None:
            return self._file.read(place.source, rows)
        wanted = order if rows is None else order[rows]
        if not len(wanted):
            return self._file.read(place.source, slice(0, 0))
        first, last = int(wanted.min()), int(wanted.max())
        return taken(self._file.read(place.source, slice(first, last + 1)), wanted - first)

    def companions(self) -> dict[str, dict[str, Any]]:
        """The files that stand beside the weights in a folder, by name; UnsupportedError if there is no way to tell."""
        tokenizer, settings = restored_tokenizer(self._file.config)
        ids = {key: value for key in ("bos_token_id", "eos_token_id") if (value := self.config.get(key)) is not None}
        return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings, "generation_config.json": ids}

    def _dtype(self) -> str:
        """The type that the model is in: that of its embeddings, since vectors are in FP32 in every file."""
        found = next((e.format for name, e in self.entries.items() if name.endswith(EMBEDDING)), Float(torch.float32))
        return str(found.dtype).removeprefix("torch.") if isinstance(found, Float) else "float32"
