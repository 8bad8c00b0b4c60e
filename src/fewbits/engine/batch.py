"""Many texts from one model, step by step: what a server needs, and what one text is made with too.

A step is one run of the model. In it go a token of every text that is being written, and in the rows that are left the
next chunk of prompts that are being read; texts join and leave between steps. So the weights are read once for all of
them, and a long prompt does not make the others wait for its end: beside texts that are being written it comes in
chunks of `BESIDE` tokens.

Where a text is alone, the rest of the run is used for a draft of how it may go on (`speculation`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Listed

import numpy as np
from numpy.typing import NDArray

from fewbits.engine.sequences import Sequence
from fewbits.engine.slots import Slots
from fewbits.engine.speculation import Pace, Speculate
from fewbits.runtime.runner import Runner

Logits = NDArray[np.float32]

BESIDE = 128
"""Rows of prompts in a step that also writes: they are what the writing waits for."""


class _Part:
    """What one sequence has in a step: its next tokens, perhaps a draft, and how many rows' logits it wants.

    It wants none while there is more of its prompt to come.
    """

    def __init__(self, sequence: Sequence, rows: int = 1, draft: Listed[int] = ()) -> None:
        self.sequence, self.draft, self.start = sequence, draft, sequence.done
        self.tokens = [*sequence.tokens[self.start : self.start + rows].tolist(), *draft]
        self.wanted = 1 + len(draft) if self.start + rows == sequence.length else 0

    def take(self, logits: Logits) -> None:
        """The step has run; logits [wanted, vocabulary]."""
        self.sequence.done += len(self.tokens) - len(self.draft)
        if self.wanted:
            self.sequence.advance(logits, self.draft)


class Batch:
    """Sequences on a runner. `add` them at any time, `step` until they have a `finish`; each collects its `pieces`.

    Not for several threads at once.
    """

    def __init__(self, runner: Runner, speculate: Speculate = "auto") -> None:
        self._runner, self._slots, self._pace = runner, Slots(runner), Pace(speculate)
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._active and not self._waiting

    def add(self, sequence: Sequence) -> None:
        """Let a sequence take part, as soon as a slot is free."""
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence where it is; what it has in its slot may still be of use. Nothing happens if it has ended."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._active:
            self._leave(sequence)

    def step(self) -> list[Sequence]:
        """Run the model once; returns the sequences that have new pieces."""
        self._admit()
        parts = self._parts()
        if not parts:
            return []
        logits, start = self._run(parts), 0
        for part in parts:
            part.take(logits[start : start + part.wanted])
            start += part.wanted
            self._note(part.sequence)
        return [part.sequence for part in parts if part.wanted]

    def _admit(self) -> None:
        while self._waiting and self._slots.free:
            sequence = self._waiting.popleft()
            sequence.slot, sequence.done = self._slots.take(sequence.tokens)
            sequence.reused = sequence.done
            self._active.append(sequence)

    def _parts(self) -> list[_Part]:
        """Who has how many rows in the next step."""
        writing = [sequence for sequence in self._active if sequence.prefilled]
        reading = [sequence for sequence in self._active if not sequence.prefilled]
        if len(writing) == 1 and not reading:
            return [self._drafted(writing[0])]
        parts = [_Part(sequence) for sequence in writing[: self._runner.most_rows]]
        room = self._runner.most_rows - len(parts)
        room = min(room, BESIDE) if parts else room
        for sequence in reading:
            rows = min(sequence.length - sequence.done, room)
            parts += [_Part(sequence, rows)] if rows else []
            room -= rows
        return parts

    def _drafted(self, sequence: Sequence) -> _Part:
        draft = sequence.draft()
        length = self._pace.length(sequence.acceptance, min(len(draft), self._runner.most_rows - 1))
        return _Part(sequence, 1, draft[:length])

    def _run(self, parts: Listed[_Part]) -> Logits:
        """The logits of all wanted rows, one part after the other."""
        counts = [len(part.tokens) for part in parts]
        tokens = np.array([token for part in parts for token in part.tokens], np.int32)
        slots = np.repeat(np.array([part.sequence.slot for part in parts], np.int32), counts)
        spans = [(part.start, part.start + count) for part, count in zip(parts, counts, strict=True)]
        positions = np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])
        ends = zip(parts, np.cumsum(counts), strict=True)
        wanted = np.concatenate([np.arange(end - part.wanted, end, dtype=np.int32) for part, end in ends])
        before = time.perf_counter()
        logits = self._runner.forward(tokens, slots, positions, wanted)
        if len(parts) == 1 and len(wanted) == len(tokens):
            self._pace.took(len(tokens), time.perf_counter() - before)
        return logits

    def _note(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        if sequence.finish is not None:
            self._leave(sequence)
        else:
            self._slots.note(sequence.slot, sequence.tokens[: sequence.done])

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._active.remove(sequence)
        self._slots.give_back(sequence.slot, sequence.tokens[: sequence.done])
