"""A runner whose logits can be worked out by hand: they depend on every token of the prefix, as its slot holds it."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models

from fewbits.engine.text import Text

LETTERS = "abcdefgh"


class Toy:
    """logits = table[Σ (i + 1) · token_i modulo the table's rows]; refuses calls that no runner could serve."""

    def __init__(self, *, context: int = 32, slots: int = 1, most_rows: int = 8, states: int = 11, sharp: float = 1.5):
        self.vocabulary, self.context, self.slots, self.most_rows = len(LETTERS), context, slots, most_rows
        self.table = (np.random.default_rng(5).standard_normal((states, self.vocabulary)) * sharp).astype(np.float32)
        self.cache = np.full((slots, context), -1)
        self.calls: list[int] = []
        self.copies: list[tuple[int, int, int]] = []

    def logits(self, prefix) -> np.ndarray:
        return self.table[int(np.dot(np.arange(1, len(prefix) + 1), prefix)) % len(self.table)]

    def forward(self, tokens, slots, positions, wanted):
        assert 0 < len(tokens) == len(slots) == len(positions) <= self.most_rows
        assert all(part.dtype == np.int32 for part in (tokens, slots, positions, wanted))
        for slot in set(slots.tolist()):
            rows = np.flatnonzero(slots == slot)
            assert (np.diff(rows) == 1).all()
            assert (np.diff(positions[rows]) == 1).all()
        self.calls.append(len(tokens))
        found = []
        for row, (token, slot, position) in enumerate(zip(tokens, slots, positions, strict=True)):
            self.cache[slot, position] = token
            prefix = self.cache[slot, : position + 1]
            assert (prefix >= 0).all(), "a token sees positions that were never run"
            if row in wanted:
                found.append(self.logits(prefix))
        return np.array(found, np.float32).reshape(len(wanted), self.vocabulary)

    def copy(self, source: int, target: int, length: int) -> None:
        self.copies.append((source, target, length))
        self.cache[target] = -1
        self.cache[target, :length] = self.cache[source, :length]


def text(ends: str = "") -> Text:
    """A tokenizer of eight letters, a token each."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    return Text(tokenizer.to_str(), {}, {"eos_token_id": [LETTERS.index(letter) for letter in ends]})
