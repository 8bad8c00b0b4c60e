"""A checkpoint's parameters as programs need them: matrices in tiles, vectors in float32, by transformers' own names.

transformers renames what old checkpoints call otherwise and joins experts; its table of renamings is asked here too
(`loading.placements`), so a family knows one name for each parameter, and experts are matrices one by one, whichever
way they lie on disk. What has been asked for is remembered: a parameter that nobody asked for is one that the program
would have ignored, and so a reason not to run it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fewbits.checkpoint import is_scale
from fewbits.engine.loading import Placement, placements, refuse_unexpected
from fewbits.engine.skeleton import skeleton
from fewbits.engine.tiling import Read, taken, tile
from fewbits.engine.weights import Weight as Stored
from fewbits.engine.weights import open_weights
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import QTensor
from fewbits.runtime.ops import Rotary
from fewbits.runtime.tiles import Weight

Keep: TypeAlias = Callable[[Weight], Weight]

CPU = torch.device("cpu")
EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")
EXPERT_PARTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
"""What checkpoints call the three matrices of an expert: Qwen's names, then Mixtral's."""
ROTARY = ("default", "linear", "yarn", "llama3", "longrope")
"""Kinds of rotary angles that are the same at every length, longrope up to a length (see `longest`)."""


class Parameters:
    """The parameters of an open checkpoint, and its configuration.

    keep: what becomes of each weight once it is in tiles (written to a file, say); it returns the weight to use.
    rounds_inputs: whether the checkpoint wants inputs of linear layers rounded.
    """

    def __init__(self, path: Path, keep: Keep = lambda weight: weight) -> None:
        self.config, weights = open_weights(path)
        self._model, self._keep = skeleton(self.config, torch.float32), keep
        expected = dict(self._model.state_dict())
        stored = {name: weight for name, weight in weights.items() if not is_scale(weight.entry)}
        self.rounds_inputs = any(weight.entry.inputs is not None for weight in stored.values())
        placed, unexpected = placements(self._model, stored, expected)
        refuse_unexpected(self._model, unexpected)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        self._placed: dict[str, Placement] = {placement.target: placement for placement in placed}
        self._kept: dict[tuple[str, range | None, int | None], Weight] = {}
        self._asked = set[str]()

    def has(self, name: str) -> bool:
        return name in self._placed

    def vector(self, name: str, added: float = 0.0) -> NDArray[np.float32]:
        """A parameter of one dimension, with something added to each number."""
        numbers = self._only(name).numbers(torch.float32, CPU)
        found: NDArray[np.float32] = (numbers + added).numpy()
        return found

    def matrix(self, name: str, rows: range | None = None) -> Weight:
        """A matrix in tiles, or some consecutive rows of it; one that is tied to another is that one."""
        if not self.has(name):
            name = self._tied(name)
        return self._matrix(self._only(name), (name, rows, None))

    def experts(self, name: str, part: str, count: int) -> tuple[Weight, ...]:
        """The matrices `part` (gate, up or down) of all experts, under `name`, which ends in `.experts`."""
        fused = f"{name}.down_proj" if part == "down" else f"{name}.gate_up_proj"
        placement = self._placement(fused)
        if placement.conversion is None:
            ((_, stored),) = placement.sources
            return tuple(self._slice(stored, fused, part, expert) for expert in range(count))
        found = dict(_experts(placement, part))
        if sorted(found) != list(range(count)):
            raise CheckpointError(f"{fused}: {len(found)} of {count} experts have a {part}; a shard may be missing")
        return tuple(self._matrix(found[number], (f"{fused}.{part}", None, number)) for number in range(count))

    def rotary(self, kind: str | None = None) -> Rotary:
        """Rotary angles as transformers computes them; kind: of layers, where they differ."""
        module: Any = self._model.base_model.rotary_emb
        prefix = f"{kind}_" if kind else ""
        frequencies = getattr(module, f"{prefix}inv_freq").float().numpy()
        return Rotary(frequencies.copy(), float(getattr(module, f"{prefix}attention_scaling")))

    def require_all_used(self) -> None:
        """Raise UnsupportedError where the checkpoint has a parameter that no part of the program uses."""
        left = sorted(self._placed.keys() - self._asked)
        if left:
            raise UnsupportedError(f"{len(left)} parameters have no place in the program, {left[0]} for one")

    def _placement(self, name: str) -> Placement:
        if name not in self._placed:
            raise CheckpointError(f"{name}: not in the checkpoint, and the model needs it; a shard may be missing")
        self._asked.add(name)
        return self._placed[name]

    def _only(self, name: str) -> Stored:
        ((_, stored),) = self._placement(name).sources
        if stored.entry.shape != self._shapes[name]:
            raise CheckpointError(
                f"{name} is {list(stored.entry.shape)} in the checkpoint, but config.json asks for "
                f"{list(self._shapes[name])}; they do not belong together"
            )
        return stored

    def _tied(self, name: str) -> str:
        tied: Mapping[str, str] = self._model.all_tied_weights_keys
        return tied.get(name, name)

    def _matrix(self, stored: Stored, key: tuple[str, range | None, int | None]) -> Weight:
        if key not in self._kept:
            rows = key[1] or range(stored.entry.shape[0])
            shape = (len(rows), stored.entry.shape[1])
            self._kept[key] = self._keep(tile(stored.entry.format, shape, _reader(stored, rows)))
        return self._kept[key]

    def _slice(self, stored: Stored, name: str, part: str, expert: int) -> Weight:
        """One matrix of a parameter that holds those of all experts, [experts, rows, columns]."""
        whole = stored.reader.read(stored.entry.name, slice(expert, expert + 1))
        n, columns = stored.entry.shape[1:]
        start, stop = {"gate": (0, n // 2), "up": (n // 2, n), "down": (0, n)}[part]
        one = taken(_without_experts(whole), slice(start, stop))
        return self._keep(tile(one.format, (stop - start, columns), lambda rows: taken(one, rows)))


def _experts(placement: Placement, part: str) -> list[tuple[int, Stored]]:
    named = [(EXPERT.search(stored.entry.name), stored) for _, stored in placement.sources]
    return [(int(match[1]), stored) for match, stored in named if match and match[2] in EXPERT_PARTS[part]]


def _without_experts(weight: QTensor) -> QTensor:
    params = {key: p[0] if p.dim() == weight.codes.dim() else p for key, p in weight.params.items()}
    return QTensor(weight.format, weight.codes[0], params)


def _reader(stored: Stored, rows: range) -> Read:
    """Reads slabs of these rows: from the file, or from all of it where rows depend on one another or are permuted."""
    name, order = stored.entry.name, stored.row_order()
    if stored.restored is not None and stored.restored.added:
        raise UnsupportedError(f"{name}: a matrix with {stored.restored.added} added to it has no tiles")
    if order is None and stored.entry.format.rowwise:
        return lambda part: stored.reader.read(name, slice(rows.start + part.start, rows.start + part.stop))
    whole = stored.reader.read(name)
    if order is not None:
        whole = taken(whole, order)
    return lambda part: taken(whole, slice(rows.start + part.start, rows.start + part.stop))


def longest(config: Any) -> int:
    """Tokens up to which a program computes what the model does: its positions, or those of longrope's first table."""
    positions = int(config.max_position_embeddings)
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope" and rope["short_factor"] != rope["long_factor"]:
            positions = min(positions, int(rope["original_max_position_embeddings"]))
    return positions


def rotary_trouble(config: Any) -> str | None:
    """Why rotary angles cannot be computed once for all lengths, if they cannot."""
    kinds = [rope.get("rope_type", "default") for rope in _ropes(config)]
    return next(
        (f"rotary angles of type '{kind}' change with the length" for kind in kinds if kind not in ROTARY), None
    )


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotary parameters of all layers, or of each kind of layer."""
    found = config.rope_parameters
    return [found] if "rope_type" in found else [rope for rope in found.values() if rope is not None]
