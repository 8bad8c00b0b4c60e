"""Embeddings and the projection to the vocabulary, solved before the first block.

They are a good part of a small model, and most of the damage where they are rounded alone. What an error costs is known
from the way back through the original (`_way_back`): as embeddings a matrix is weighed by the covariance of the
gradients that its rows get, as projection by that of the hidden states it reads, and tied ones by the sum of both. The
rows of either are solved under that as Hessian. On a small Llama with tied embeddings this takes 40 % off their share
of the divergence at 3 and 4 bits. The blocks then run behind the quantized embeddings and make up for what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewbits.formats import Format, Grouped, QTensor
from fewbits.methods import METHODS, TensorMethod
from fewbits.pipeline._blocks import SolvedBlock, Work, relative_error
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._way_back import WayBack
from fewbits.stats import Curvature

VOCABULARY = "vocabulary"  # stage of the journal
WINDOWS = 64  # of the calibration text that run back: each token's gradient counts, so fewer do than for Hessians


def put_vocabulary(work: Work, ids: Tensor, journal: Journal, limit: int) -> None:
    """Solve what lies outside of the blocks, if it is not in the journal yet, and put it into the model.

    ids: windows [n, T]. limit: bytes of hidden states in memory; more of them go beside the journal.
    """
    if not work.vocabulary:
        return
    if not journal.finished(VOCABULARY):
        journal.save(VOCABULARY, 0, _solved(work, ids[:WINDOWS], journal.folder, limit))
    for name, q in journal.load(VOCABULARY, 0).matrices.items():
        work.model.replace(work.vocabulary[name].parameter, work.vocabulary[name].restored(q.dequantize()))


def statistics_of(uses: Sequence[Curvature], tokens: int) -> dict[str, Tensor]:
    """What solvers take for statistics of a matrix's inputs, from all that it is used for."""
    hessian = torch.stack([use.inner * use.rows.sum() for use in uses]).sum(0)
    hessian /= sum(float(use.rows.sum()) for use in uses) or 1.0
    return {"hessian": hessian, "importance": hessian.diagonal().clone(), "tokens": torch.tensor([float(tokens)])}


def vocabulary_uses(work: Work, way: WayBack) -> dict[str, list[Curvature]]:
    """Matrix outside of the blocks -> the curvature of each of its uses. The way back is gone where it is needed."""
    output, uses = way.output(), dict[str, list[Curvature]]()
    reads = {name: work.model.uses(slot.parameter) for name, slot in work.vocabulary.items()}
    if any(embeds for embeds, _ in reads.values()):
        for _ in way.blocks(work):
            pass
    for name, (embeds, projects) in reads.items():
        uses[name] = [way.embeddings()] if embeds else []
        uses[name] += [output] if projects else []
    return uses


def solve_matrix(solver: TensorMethod, w: Tensor, format: Format, statistics: dict[str, Tensor]) -> QTensor:
    """One matrix of the vocabulary."""
    wanted = (*solver.needs, *solver.wants, "tokens")
    return solver.quantize(w, format, {key: value for key, value in statistics.items() if key in wanted})


def solver_for(work: Work, format: Format) -> TensorMethod:
    """The recipe's own where it looks at matrices one by one, gptq-fast (or rtn) where it needs a block."""
    if isinstance(work.recipe.solver, TensorMethod):
        return work.recipe.solver
    by_columns = format.columnwise and isinstance(format, Grouped)
    found = METHODS["gptq-fast" if by_columns else "rtn"]
    assert isinstance(found, TensorMethod)
    return found


@torch.no_grad()
def _solved(work: Work, ids: Tensor, folder: Path, limit: int) -> SolvedBlock:
    with WayBack(work.model, ids, folder=folder, limit=limit) as way:
        uses = vocabulary_uses(work, way)
    matrices, errors = dict[str, QTensor](), dict[str, float]()
    for name, slot in work.vocabulary.items():
        w, format = slot.take(work.model.outer(slot.parameter)), work.formats[name]
        matrices[name] = solve_matrix(solver_for(work, format), w, format, statistics_of(uses[name], ids.numel()))
        errors[name] = relative_error(w, matrices[name])
    return SolvedBlock(matrices, {}, errors, {})
