"""A few true divergences, by which the planner's predictions are corrected.

The curvature leaves out what errors at different tokens do together, and what does not follow the second order. Both
are alike within a role (all queries, all values …), so each role is tried once: its matrices in all blocks are
quantized in one coarse format, the rest of the model stays as it is, and what held-out text says is compared with what
was predicted. All roles go through the model side by side, so each block is loaded once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.evals import kl_divergence
from fewbits.formats import QTensor
from fewbits.methods.block import Block
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._blocks import Work, advance, open_block
from fewbits.pipeline._guard import copied
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._streams import BATCH, embedded

PROBE = "probe"  # stage of the journal


def role_of(matrix: str) -> str:
    """What a matrix does, its number in the model left out: blk.3.attn_q.weight is an attn_q."""
    plain = re.sub(r"\.\d+(?=\.)", "", matrix.removesuffix(".weight"))
    return plain.rpartition(".")[2]


@dataclass(frozen=True)
class Probes:
    """Matrices that were quantized for it, in a journal, those outside of the blocks last."""

    work: Work
    journal: Journal
    ids: Tensor

    @torch.no_grad()
    def divergences(self) -> dict[str, float]:
        """Role -> nats a token from the original on windows ids [n, T] with its matrices quantized."""
        work, batch = self.work, max(1, BATCH // self.ids.shape[1])
        roles = sorted({role_of(name) for name in work.slots})
        with work.model.outside(), work.model.exact():
            original = embedded(work.model, self.ids, batch)
            streams = {role: copied(original) for role in roles}
            outside = self._outside(batch)
            for index in range(len(work.model.layers)):
                block = open_block(work, index)
                for stream in (original, *(stream for stream, _ in outside.values())):
                    advance(block, stream, batch)
                solved = self.journal.load(PROBE, index).matrices
                for role in roles:
                    _advance_changed(
                        block, {n: q for n, q in solved.items() if role_of(n) == role}, streams[role], batch
                    )
                work.model.drop(index)
            found = {role: self._divergence(original, streams[role], {}) for role in roles}
            return found | {role: self._divergence(original, *changed) for role, changed in outside.items()}

    def _outside(self, batch: int) -> dict[str, tuple[Activations, Mapping[str, QTensor]]]:
        """Role outside of the blocks -> its stream, and its matrices."""
        work = self.work
        by_role: dict[str, dict[str, QTensor]] = defaultdict(dict)
        for name, q in self.journal.load(PROBE, len(work.model.layers)).matrices.items():
            by_role[role_of(name)][name] = q
        found: dict[str, tuple[Activations, Mapping[str, QTensor]]] = {}
        for role, matrices in by_role.items():
            with self._replaced(matrices):
                found[role] = embedded(work.model, self.ids, batch), matrices
        return found

    def _replaced(self, matrices: Mapping[str, QTensor]) -> AbstractContextManager[None]:
        slots = self.work.vocabulary
        values = {slots[n].parameter: slots[n].restored(q.dequantize()) for n, q in matrices.items()}
        return self.work.model.replaced(values)

    def _divergence(self, original: Activations, stream: Activations, matrices: Mapping[str, QTensor]) -> float:
        """Mean over all predictions, `matrices` outside of the blocks being quantized."""
        model, parts = self.work.model, list[Tensor]()
        for start, theirs in original.batches(1):
            wanted = model.logits(theirs.to(model.device))[0, :-1]
            with self._replaced(matrices):
                found = model.logits(stream.span(start, start + 1).to(model.device))[0, :-1]
            parts.append(kl_divergence(wanted, found))
        return float(torch.cat(parts).mean())


def corrections(
    measured: Mapping[str, float], predicted: Mapping[str, float], roles: Sequence[str]
) -> dict[str, float]:
    """Role -> measured over predicted divergence; none for a role that nothing was predicted for or measured of."""
    return {role: measured[role] / predicted[role] for role in roles if min(measured[role], predicted[role]) > 0}


def _advance_changed(block: Block, matrices: Mapping[str, QTensor], stream: Activations, batch: int) -> None:
    before = {name: block.matrix(name).clone() for name in matrices}
    for name, q in matrices.items():
        block.put(name, q.dequantize().to(block.device))
    advance(block, stream, batch)
    for name, w in before.items():
        block.put(name, w)
