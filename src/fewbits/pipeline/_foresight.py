"""What solving blocks will take, said before it starts: seconds, bytes of memory, bytes of disk.

Time is measured on this machine: the first layer runs over one batch while its inputs are measured, and the solver
works on part of a random matrix. From there it is counting: how many batches pass through how many blocks, how many
such parts there are in the model's matrices. Memory is counted too: a block and what a solver holds beside it, the
statistics of its inputs, the hidden states.
"""

from __future__ import annotations

import time
from contextlib import suppress

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.methods import TensorMethod
from fewbits.methods.recipe import Recipe
from fewbits.pipeline._blocks import Work, open_block
from fewbits.pipeline._estimate import resident_memory
from fewbits.pipeline._guard import CHECKS
from fewbits.pipeline._measure import measured
from fewbits.pipeline._streams import BATCH
from fewbits.pipeline._vocabulary import WINDOWS, solver_for
from fewbits.results import Estimate
from fewbits.stats import AllSeen

SAMPLES = ((1024, 256), (1024, 1024))  # rows and columns of the random matrices that a solver is timed on
HELD_COPIES = 4  # of the held-out windows' hidden states in memory
BATCH_COPIES = 12  # of one batch's hidden states in memory while a block runs, those of wider layers included
PARTS = 1.25  # runs, in all, up to the matrices of one step after the other, but for the last step's
LIBRARIES = 128 << 20  # that torch and transformers take for themselves once a model runs
WAY_BACK = 5  # runs through a block: forth, back with its run anew, and the predictions; measured
PREDICTION_COPIES = 5  # of one window's predictions in memory
MATRIX_COPIES = 4  # of the vocabulary's larger matrix in memory while it is solved
SOLVER_COPIES = 6  # of what is solved at the same time, float32, in memory meanwhile; measured


def foresee(work: Work, ids: Tensor, held: int, memory: int) -> tuple[Estimate, float]:
    """(peak memory, disk and seconds of solving all blocks on windows ids [n, T]; seconds of a window through them).

    held: windows that are held out. memory: bytes of hidden states beyond which they go to disk.
    """
    base = resident_memory()
    window = 4 * ids.shape[1] * work.model.hidden_size
    states = window * len(ids) * (2 if needs_original(work.recipe) else 1)
    spilled = states > memory
    size, seconds = _first_block(work, ids)
    counted = sum(work.formats[name].nbytes(shape) for name, shape in work.shapes.items())
    vocabulary = _vocabulary(work, ids, window, seconds, memory)
    need = Estimate(
        peak_memory=base
        + LIBRARIES
        + max(size + (0 if spilled else states), vocabulary.peak_memory)
        + held * window * HELD_COPIES,
        disk=counted + max(states if spilled else 0, vocabulary.disk),
        seconds=_passes(work, len(ids), held) * seconds * len(ids) + _solving(work) + vocabulary.seconds,
    )
    return need, seconds * len(work.model.layers)


def needs_original(recipe: Recipe) -> bool:
    """Whether a method compares with what the original's blocks read or return."""
    methods = (*recipe.transforms, recipe.solver)
    return any(method.runs or "drift" in (*method.needs, *method.wants) for method in methods)


def _vocabulary(work: Work, ids: Tensor, window: int, seconds: float, memory: int) -> Estimate:
    """What solving embeddings and projection takes: windows of ids forth and back, with what every block read of them.

    window: bytes of a window's hidden states; seconds: that it takes through a block.
    """
    if not work.vocabulary:
        return Estimate(0, 0, 0.0)
    windows, blocks = min(len(ids), WINDOWS), len(work.model.layers)
    shapes = {name: work.shapes[name] for name in work.vocabulary}
    states = (blocks + 1) * windows * window
    predictions = 4 * ids.shape[1] * max(rows for rows, _ in shapes.values()) * PREDICTION_COPIES
    weights = 4 * MATRIX_COPIES * max(rows * columns for rows, columns in shapes.values())
    solving = sum(_seconds(solver_for(work, work.formats[name]), work.formats[name], *shapes[name]) for name in shapes)
    spilled = states if states > memory else 0
    peak = predictions + weights + states - spilled
    return Estimate(peak, spilled, WAY_BACK * windows * blocks * seconds + solving)


def _seconds(solver: TensorMethod, format: Format, rows: int, columns: int) -> float:
    linear, quadratic = _sampled(solver, format)
    return rows * (linear * columns + quadratic * columns**2) / (1 if solver.shares else torch.get_num_threads())


def _first_block(work: Work, ids: Tensor) -> tuple[int, float]:
    """(bytes in memory while a block is solved, seconds a window takes through it with its inputs measured)."""
    batch = ids[: max(1, BATCH // ids.shape[1])]
    block = open_block(work, 0)
    needs = (*work.recipe.solver.needs, *work.recipe.solver.wants)
    with torch.no_grad():
        x = work.model.embed(batch)
        block.run(x)  # the first time allocates
        began = time.perf_counter()
        collector = measured(block, needs, batch.numel())
        with suppress(AllSeen), collector:
            block.run(x)
        seconds = time.perf_counter() - began
    parameters = sum(p.numel() for p in block.parameters.values())
    statistics = {id(found): found.nbytes for found in collector.statistics().values()}
    largest = max((block.matrix(name).numel() for name in block.slots), default=0)
    work.model.drop(0)
    drifts = 2 * largest if "drift" in needs else 0  # of matrices that read the same input: gate and up, most often
    solving = 4 * (2 * parameters + drifts + _solved_at_once(work, largest) * SOLVER_COPIES)
    return solving + _held(work, list(statistics.values())) + 4 * x.numel() * BATCH_COPIES, seconds / len(batch)


def _solved_at_once(work: Work, largest: int) -> int:
    """Weights that are solved at the same time, given those of the largest matrix."""
    solver = work.recipe.solver
    if isinstance(solver, TensorMethod) and solver.shares:
        return min(largest, solver.slab or largest)
    return largest * min(len(work.slots), torch.get_num_threads())


def _held(work: Work, statistics: list[int]) -> int:
    """Bytes of statistics, given those of each of a block's inputs: of one at a time where they are solved in order."""
    return max(statistics, default=0) if work.recipe.solver.in_order else sum(statistics)


def _passes(work: Work, windows: int, held: int) -> float:
    """How often each calibration window goes through a block, over all blocks; held-out ones in proportion."""
    count, recipe = len(work.model.layers), work.recipe
    measuring = sum(bool((*m.needs, *m.wants)) for m in (*recipe.transforms, recipe.solver))
    streams = 1 + needs_original(recipe)
    each = measuring + streams + recipe.solver.windows_run / windows
    if recipe.solver.in_order:
        each += streams * PARTS
    guarding = held / windows * count * (2 + min(CHECKS, count) / 2)
    return count * each + guarding


def _solving(work: Work) -> float:
    """Seconds in the solver itself, for solvers that look at one tensor at a time."""
    solver = work.recipe.solver
    if not isinstance(solver, TensorMethod):
        return 0.0
    costs = {format: _sampled(solver, format) for format in {work.formats[name] for name in work.slots}}
    total = 0.0
    for name, (*_, n, k) in _shapes(work).items():
        linear, quadratic = costs[work.formats[name]]
        total += n * (linear * k + quadratic * k**2)
    return total if solver.shares else total / torch.get_num_threads()


def _sampled(solver: TensorMethod, format: Format) -> tuple[float, float]:
    """Seconds that the solver takes, on as many threads as it will have, for each weight and for each of its pairs with
    a column.
    """
    (rows, narrow), (_, wide) = SAMPLES
    low, high = (_timed(solver, format, *shape) / (rows * shape[1]) for shape in SAMPLES)
    slope = max(0.0, (high - low) / (wide - narrow))
    return high - slope * wide, slope


def _timed(solver: TensorMethod, format: Format, rows: int, columns: int) -> float:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator)
    stats = {"importance": x.square().mean(0), "hessian": x.T @ x / len(x)}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if solver.shares else 1)
    try:
        began = time.perf_counter()
        solver.quantize(w, format, {key: stats[key] for key in (*solver.needs, *solver.wants) if key in stats})
        return time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)


def _shapes(work: Work) -> dict[str, tuple[int, ...]]:
    return {name: work.shapes[name] for name in work.slots}
