"""The last stage: a finisher gets the whole quantized model, and what it makes of it goes into the journal.

In memory are then the codes of all blocks, what is not quantized in them, and hidden states of the calibration windows
in front of the first block and behind the original's last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewbits.engine import LayeredModel
from fewbits.formats import QTensor
from fewbits.methods import Finisher
from fewbits.methods.base import Finished, Quantized
from fewbits.methods.block import Block
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._blocks import SolvedBlock, Work, advance, block_of, open_block, relative_error, restore
from fewbits.pipeline._guard import Guard
from fewbits.pipeline._journal import Journal
from fewbits.pipeline._streams import embedded

Progress = Callable[[int, int, str], None]
BATCH = 8  # windows


def finish_blocks(
    work: Work, ids: Tensor, journal: Journal, stage: str, finisher: Finisher, folder: Path | None
) -> str:
    """Run a finisher over the blocks of a stage on windows ids [n, T]; the name of the stage it makes.

    folder: where to keep hidden states, instead of in memory.
    """
    made, count = finisher.name, len(work.model.layers)
    if journal.finished(made) == count:
        return made
    solved = [journal.load(stage, index) for index in range(count)]
    files = [None if folder is None else folder / f"{name}.states" for name in ("inputs", "targets")]
    with work.model.outside():
        inputs = embedded(work.model, ids, BATCH, files[0])
        with work.model.original():
            targets = embedded(work.model, ids, BATCH, files[1])
        for index in range(count):
            work.model.load(index)
            _advance(work.model, index, targets)
            work.model.drop(index)
        blocks = [_without_matrices(work, index, found) for index, found in enumerate(solved)]
        model = Quantized(
            blocks=blocks,
            tensors=[found.matrices for found in solved],
            free=[_free(work, block) for block in blocks],
            inputs=inputs,
            targets=targets,
            logits=work.model.logits,
            originals=partial(_original_logits, work.model),
        )
        finished = finisher.finish(model)
        for index in range(count):
            work.model.drop(index)
    for kept in (inputs, targets):
        kept.close()
    for index, found in enumerate(solved):
        journal.save(made, index, _merged(work, index, found, finished))
    return made


def _original_logits(model: LayeredModel, x: Tensor) -> Tensor:
    with model.original():
        return model.logits(x)


def _without_matrices(work: Work, index: int, solved: SolvedBlock) -> Block:
    """A block with everything but its quantized matrices in memory."""
    prefix = work.model.layers[index] + "."
    whole = {slot.parameter for slot in work.slots.values() if slot.parameter.startswith(prefix)}
    module = work.model.load(index, without=whole)
    block = block_of(work, index, module)
    for name, value in solved.changed.items():
        block.parameters[name.removeprefix(prefix)].copy_(value)
    return block


def _free(work: Work, block: Block) -> dict[str, torch.dtype]:
    """Norms and biases, and the types that they are written in."""
    quantized = {slot.parameter for slot in block.slots.values()}
    vectors = [name for name, p in block.parameters.items() if p.dim() == 1 and name not in quantized]
    return {name: work.dtypes[f"{block.name}.{name}"] for name in vectors if f"{block.name}.{name}" in work.dtypes}


def _merged(work: Work, index: int, solved: SolvedBlock, finished: Finished) -> SolvedBlock:
    """The block with what a finisher changed."""
    prefix = work.model.layers[index] + "."
    changed = {prefix + name: value.cpu() for name, value in finished.changed[index].items()}
    matrices = finished.tensors[index]
    return SolvedBlock(matrices, {**solved.changed, **changed}, _errors(work, index, solved, matrices), solved.scales)


def _errors(work: Work, index: int, solved: SolvedBlock, matrices: Mapping[str, QTensor]) -> Mapping[str, float]:
    """Relative errors, now that params have changed; the solver's own where a transform left other matrices than the
    source's, because those are gone.
    """
    if any(not transform.rewrites for transform in work.recipe.transforms):
        return solved.errors
    block = open_block(work, index)
    errors = {name: relative_error(block.matrix(name), q) for name, q in matrices.items()}
    work.model.drop(index)
    return errors


@torch.no_grad()
def _advance(model: LayeredModel, index: int, stream: Activations) -> None:
    for start, states in stream.batches(BATCH):
        stream.put(start, model.run(index, states.to(model.device)))


@torch.no_grad()
def held_out_divergence(work: Work, journal: Journal, stage: str, guard: Guard, ids: Tensor) -> float:
    """How far the model of a stage is from the original on held-out windows, nats a token."""
    with work.model.outside():
        stream = embedded(work.model, ids, BATCH)
    for index in range(len(work.model.layers)):
        run_solved(work, journal, stage, index, stream)
    return guard.measure(len(work.model.layers) - 1, stream)


@torch.no_grad()
def run_solved(work: Work, journal: Journal, stage: str, index: int, stream: Activations) -> None:
    """Move a stream behind a block of the journal."""
    block = open_block(work, index)
    restore(block, journal.load(stage, index))
    with work.model.exact():
        advance(block, stream, BATCH)
    work.model.drop(index)
