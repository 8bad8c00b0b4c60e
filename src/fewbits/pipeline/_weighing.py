"""Errors weighed by an importance matrix from a file, so that nothing has to run.

The file names tensors as GGUF does. A GGUF output has these names too; in a folder a tensor is looked up by the name
that its source parameter would have in GGUF. Tensors without an entry are quantized with all columns alike, and their
lines in the ledger say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fewbits.checkpoint import KINDS, Kind, Reader
from fewbits.checkpoint.imatrix import read_imatrix
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.methods import Recipe
from fewbits.models import Architecture, Piece
from fewbits.pipeline._source import cut
from fewbits.plan.rules import Choice, Plan


@dataclass(frozen=True, eq=False)
class Weighing:
    """importance: tensor of the output -> mean x² of its columns, float32 [K]. file: its name."""

    importance: Mapping[str, Tensor]
    file: str

    def statistics(self, name: str) -> dict[str, Tensor]:
        """As methods take them."""
        return {"importance": self.importance[name]} if name in self.importance else {}

    def noted(self, plan: Plan) -> Plan:
        """The plan with a reason where a tensor is quantized without an entry."""
        return {name: choice if name in self.importance else self._unweighed(choice) for name, choice in plan.items()}

    def _unweighed(self, choice: Choice) -> Choice:
        if not choice.quantized:
            return choice
        why = f"its columns count alike, because {self.file} has no entry for it"
        return replace(choice, reason=f"{choice.reason}; {why}" if choice.reason else why)


def weighing(path: Path, kind: Kind, architecture: Architecture, reader: Reader, pieces: tuple[Piece, ...]) -> Weighing:
    """The importance of the output's tensors.

    Raises CheckpointError for a file that is no importance matrix or one of another model, UnsupportedError for a
    folder whose architecture has no names in GGUF.
    """
    found = read_imatrix(path).importance
    names = {} if kind.name == "gguf" else _gguf_names(path, architecture, reader)
    importance = {
        piece.name: _fitting(path, piece, entry, found[entry])
        for piece in pieces
        if (entry := names.get(piece.source, piece.name)) in found
    }
    if not importance:
        raise CheckpointError(
            f"{path}: none of its {len(found)} entries belongs to a tensor of this model; make it from this model, "
            "with `fewbits imatrix` or llama-imatrix"
        )
    return Weighing(importance, path.name)


def _gguf_names(path: Path, architecture: Architecture, reader: Reader) -> dict[str, str]:
    """Parameter of the source -> its name in a GGUF file."""
    try:
        return {piece.source: piece.name for piece in cut(KINDS["gguf"], architecture, reader)}
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{path}: an importance matrix names tensors as GGUF does, and this model has no such names ({error}); "
            "give the text itself (--calibration)"
        ) from error


def _fitting(path: Path, piece: Piece, entry: str, means: Tensor) -> Tensor:
    """The entry, if there is a number for each of the tensor's columns."""
    wanted = (*piece.shape[:-2], piece.shape[-1])
    if tuple(means.shape) != wanted:
        raise CheckpointError(
            f"{path}: its entry '{entry}' has shape {list(means.shape)}, must be {list(wanted)} for {piece.name} "
            f"{list(piece.shape)}; it is of another model"
        )
    return means


def require_weighable(recipe: Recipe) -> None:
    """Raise UnsupportedError where a recipe cannot use mean x² of the source's inputs, and nothing else."""
    why = _objection(recipe)
    if why is not None:
        raise UnsupportedError(
            f"an importance matrix is the mean x² of what the original reads, and method {recipe.name} {why}; "
            "take rtn, or leave it out"
        )


def _objection(recipe: Recipe) -> str | None:
    methods = (*recipe.transforms, recipe.solver, *recipe.finishers)
    needs = sorted({need for method in methods for need in method.needs})
    if needs:
        return f"also needs their {' and '.join(needs)}, which takes a text (--calibration)"
    if recipe.transforms:
        return "makes them read something else"
    if not recipe.streams:
        return "runs the model on text (--calibration)"
    return None if "importance" in recipe.solver.wants else "weighs all columns alike"
