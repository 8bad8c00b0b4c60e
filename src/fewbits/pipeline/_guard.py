"""A guard against collapse: held-out text goes along, and a run whose divergence passes a limit stops and says where.

What counts is how far the predictions of the model as it is now (blocks so far quantized, the rest original) are from
the original's, in nats per token, on windows that nothing is calibrated on. Finding out means running the rest of the
model on them, so it is done after every quarter of the blocks, and on all windows only in the end or where a few are
past the limit. When a check fails, the blocks since the last one are put in again one by one, to name the one that
broke it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.engine import LayeredModel
from fewbits.errors import QualityError
from fewbits.evals import kl_divergence
from fewbits.pipeline._activations import Activations
from fewbits.pipeline._streams import embedded

CHECKS = 4  # over the whole model
BATCH = 8  # windows that are copied at once
GLANCE = 2  # windows that a check before the last one looks at first

Redo = Callable[[int, Activations], None]
"""Moves a stream behind quantized block `index` once more."""


class Guard:
    """Compares predictions on held-out windows with the original's; the limit is in nats per token.

    Made before the first block is quantized: `held` is what that block reads of windows ids [n, T], and is left as it
    is.
    """

    def __init__(self, model: LayeredModel, ids: Tensor, held: Activations, limit: float, batch: int) -> None:
        self._model, self._limit, self._batch = model, limit, batch
        self._passed, self._last = copied(held), -1  # the stream at the last check, and the block before it
        with model.original():
            self._original = self._rest(embedded(model, ids, batch), -1)
        self.divergence = 0.0  # at the last check

    def check(self, index: int, held: Activations, redo: Redo) -> None:
        """Compare, if it is time, with blocks up to `index` quantized; `held` is the stream behind them.

        Raises QualityError past the limit, naming the block that passed it.
        """
        count = len(self._model.layers)
        if index < count - 1 and (index + 1) % -(-count // CHECKS):
            return
        divergence = self.measure(index, held, GLANCE) if index < count - 1 else torch.nan  # then on all windows
        if not divergence <= self._limit:
            divergence = self.measure(index, held)
        if not divergence <= self._limit:
            raise self._broken(index, divergence, redo)
        self.divergence, self._last = divergence, index
        self._passed.close()
        self._passed = copied(held)

    def _broken(self, index: int, divergence: float, redo: Redo) -> QualityError:
        """The error that names the first of the blocks since the last check that passes the limit."""
        before = self.divergence
        for suspect in range(self._last + 1, index):
            redo(suspect, self._passed)
            found = self.measure(suspect, self._passed)
            if not found <= self._limit:
                index, divergence = suspect, found
                break
            before = found
        return QualityError(
            f"{self._model.layers[index]}: once it is quantized the model's predictions on held-out text are "
            f"{divergence:.3g} nats a token from the original's ({before:.3g} before it), past the limit of "
            f"{self._limit:g}; take more bits or a better method, keep this block (--override), or raise the limit"
        )

    @torch.no_grad()
    def measure(self, index: int, held: Activations, windows: int | None = None) -> float:
        """The divergence with blocks up to `index` quantized, nats a token; on the first `windows` alone if given."""
        stream, parts = self._rest(held, index, windows), list[Tensor]()
        with self._model.outside():
            for start, ours in stream.batches(1):
                theirs = self._original.span(start, start + 1)
                with self._model.original():
                    wanted = self._model.logits(theirs.to(self._model.device))[0, :-1]
                parts.append(kl_divergence(wanted, self._model.logits(ours.to(self._model.device))[0, :-1]))
        return float(torch.cat(parts).mean())

    @torch.no_grad()
    def _rest(self, held: Activations, index: int, windows: int | None = None) -> Activations:
        """A stream behind block `index`, or its first windows, run through the original blocks after it."""
        stream = copied(held, windows)
        for later in range(index + 1, len(self._model.layers)):
            self._model.load(later)
            with self._model.exact():
                for start, states in stream.batches(self._batch):
                    stream.put(start, self._model.run(later, states.to(self._model.device)))
            self._model.drop(later)
        return stream


def copied(stream: Activations, windows: int | None = None) -> Activations:
    count = len(stream) if windows is None else min(windows, len(stream))
    copy = Activations(count, *stream.shape[1:])
    for start in range(0, count, BATCH):
        copy.put(start, stream.span(start, min(start + BATCH, count)))
    return copy
