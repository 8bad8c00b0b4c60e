"""What a run has finished so far, on disk: a killed run goes on from there by itself.

Beside an output OUT, while it is being made, lies the folder OUT.unfinished with one safetensors file for each finished
block and `run.json`, which says what is being made of what. A block's file is written under another name, flushed and
renamed, so it is there whole or not at all: a run that is killed loses the block it was at. Started again with the same
arguments it reads the finished blocks; with others it refuses, because half of one run and half of another make a
model that nobody asked for. Everything is removed once the output is complete.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewbits.checkpoint._writer import disk_errors, flush
from fewbits.errors import OutputError
from fewbits.formats import Format, QTensor
from fewbits.pipeline._blocks import SolvedBlock

FACTS = "run.json"
LOCK = "lock"


def unfinished(out: Path) -> Path:
    """The folder of an output that is being made."""
    return out.with_name(out.name + ".unfinished")


class Journal:
    """The finished blocks of one run. Used as a context, so that no other process works on the same output.

    facts: whatever decides the output's bytes, as JSON values. formats: matrix -> its format.
    Raises OutputError if the folder belongs to another run, or to one that is going on.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], formats: Mapping[str, Format]) -> None:
        self.folder = folder
        self._facts, self._formats = facts, formats

    def __enter__(self) -> Self:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._require_same_run()
        except BlockingIOError as error:
            self._lock.close()
            raise OutputError(
                f"{self.folder}: another process is making this output; wait for it, or stop it"
            ) from error
        except OutputError:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if not any(self.folder.rglob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self, stage: str) -> int:
        """How many blocks of a stage are done, counted from the first."""
        count = 0
        while self._file(stage, count).is_file():
            count += 1
        return count

    def save(self, stage: str, index: int, block: SolvedBlock) -> None:
        """Keep a block; when this returns it is on the disk."""
        arrays = {f"changed {name}": value for name, value in block.changed.items()}
        arrays |= {f"scale {name}": value for name, value in block.scales.items()}
        for name, q in block.matrices.items():
            arrays |= {f"{key} {name}": array.contiguous().cpu() for key, array in q.pack().items()}
        facts = {name: {"shape": q.shape, "error": block.errors[name]} for name, q in block.matrices.items()}
        final = self._file(stage, index)
        partial = final.with_suffix(".partial")
        with disk_errors(self.folder):
            save_file(arrays, partial, metadata={"matrices": json.dumps(facts)})
            flush(partial)
            partial.replace(final)
            flush(self.folder)

    def load(self, stage: str, index: int) -> SolvedBlock:
        """A block that `save` kept."""
        names, changed = self._matrices(stage, index), self._kept(stage, index, "changed ")
        matrices = {name: self._read(self._file(stage, index), name, facts, None) for name, facts in names.items()}
        errors = {name: facts["error"] for name, facts in names.items()}
        return SolvedBlock(matrices, changed, errors, self._kept(stage, index, "scale "))

    def index(self, stage: str) -> dict[str, tuple[int, float]]:
        """Matrix -> the block that holds it, and its relative error."""
        return {
            name: (i, facts["error"])
            for i in range(self.finished(stage))
            for name, facts in self._matrices(stage, i).items()
        }

    def changed(self, stage: str) -> dict[str, Tensor]:
        """Parameters that a transform changed and the plan keeps, of all blocks, by the running model's names."""
        return self._all(stage, "changed ")

    def scales(self, stage: str) -> dict[str, Tensor]:
        """Static scales of all blocks, by their entries' names."""
        return self._all(stage, "scale ")

    def read(self, stage: str, index: int, name: str, rows: slice | None = None) -> QTensor:
        """A matrix, or some of its rows where its format is rowwise."""
        return self._read(self._file(stage, index), name, self._matrices(stage, index)[name], rows)

    def remove(self) -> None:
        """Forget everything: the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self, stage: str, prefix: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index in range(self.finished(stage)):
            found |= self._kept(stage, index, prefix)
        return found

    def _kept(self, stage: str, index: int, prefix: str) -> dict[str, Tensor]:
        with safe_open(self._file(stage, index), "pt") as file:
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key.removeprefix(prefix): file.get_tensor(key) for key in names}

    def _file(self, stage: str, index: int) -> Path:
        return self.folder / f"{stage}-{index:05}.safetensors"

    def _matrices(self, stage: str, index: int) -> dict[str, Any]:
        with safe_open(self._file(stage, index), "pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["matrices"])
        return found

    def _read(self, path: Path, name: str, facts: Mapping[str, Any], rows: slice | None) -> QTensor:
        format, shape = self._formats[name], tuple(facts["shape"])
        with safe_open(path, "pt") as file:
            arrays = {
                key: file.get_tensor(f"{key} {name}") if rows is None else file.get_slice(f"{key} {name}")[rows]
                for key in format.arrays(shape)
            }
        height = shape[0] if rows is None else len(range(shape[0])[rows])
        return QTensor.from_arrays(format, arrays, (height, *shape[1:]))

    def _require_same_run(self) -> None:
        path = self.folder / FACTS
        if not path.exists():
            partial = path.with_suffix(".partial")
            with disk_errors(self.folder):
                partial.write_text(json.dumps(self._facts, indent=1), encoding="utf-8")
                flush(partial)
                partial.replace(path)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        meant = json.loads(json.dumps(self._facts))
        different = sorted(key for key in found.keys() | meant.keys() if found.get(key) != meant.get(key))
        if different:
            raise OutputError(
                f"{self.folder} holds an unfinished run with another {', '.join(different)}; "
                "run that command again to finish it, or remove the folder"
            )
