"""Several tokens in one run of the model: a draft is looked up in the text itself, and then checked exactly.

A run of a few tokens reads the weights once, like a run of one token, so it takes hardly longer as long as reading is
what takes the time. The draft is what followed the last two or three tokens where they came up before (Saxena 2023,
"prompt lookup decoding"): in summaries, code and conversations that is often right, and it costs nothing.

Checking (Leviathan et al. 2023, arXiv:2211.17192, for a draft that is certain of itself): at each place of the draft
the token is drawn as it would be without one. If it is the draft's, the next place is valid too; if not, the rest is
thrown away. So the text has the same distribution, and with a seed it is the same text.

Whether it pays depends on the text and on the machine. Both are measured while it runs: how often the draft's next
token is right, which is seen whether or not the draft was run, and how long runs of 1, 2, 4 and 8 tokens take. A draft
is as long as makes the most expected tokens a second; there is none where none makes more than a single token does.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Speculate = bool | Literal["auto"]

NGRAMS = (3, 2)
"""Tokens that have to have come up before, the longer ones asked first."""
LENGTHS = (7, 3, 1)
"""Tokens of a draft; with the last one of the text, a run of 8, 4 or 2."""
TRIALS = 3
"""Runs of a length before its time is believed; the first may have found cold caches."""
MEMORY = 0.9
"""How much of what was seen still counts after the next draft."""
GAIN = 1.05
"""Tokens a second over those without a draft that it must promise."""


class Lookup:
    """Where n-grams of a growing text came up last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._tokens: list[int] = []
        self._earlier: int | None = None  # where what followed the text's last tokens earlier begins

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            self._earlier = self._note()

    def draft(self, length: int) -> list[int]:
        """`length` tokens that followed the last ones when they came up before; none if they did not.

        Where that runs into the end of the text it goes on with itself, so a text that repeats itself does so.
        """
        if self._earlier is None:
            return []
        period = len(self._tokens) - self._earlier
        return [self._tokens[self._earlier + i % period] for i in range(length)]

    def _note(self) -> int | None:
        """Look up the n-grams that end here, then write them down."""
        end, found = len(self._tokens), None
        for n in NGRAMS:
            if end >= n:
                key = tuple(self._tokens[end - n :])
                found = self._ends.get(key) if found is None else found
                self._ends[key] = end
        return found


class Acceptance:
    """How often a draft's next token is right, in one text."""

    def __init__(self) -> None:
        self._right, self._asked = 1.0, 2.0  # before anything is known: every other one

    @property
    def rate(self) -> float:
        return self._right / self._asked

    def saw(self, right: int, wrong: bool) -> None:
        """So many of a draft's tokens were right, and then perhaps one was wrong."""
        self._right = MEMORY * self._right + right
        self._asked = MEMORY * self._asked + right + wrong


class Pace:
    """How long runs of 1, 2, 4 and 8 tokens take, and so how long drafts should be."""

    def __init__(self, speculate: Speculate = "auto") -> None:
        self._speculate = speculate
        self._seconds: dict[int, list[float]] = {}

    def length(self, acceptance: Acceptance, available: int) -> int:
        """Tokens that the next draft should have, of those that are available; 0 for none."""
        lengths = [length for length in LENGTHS if length <= available]
        if self._speculate != "auto":
            return max(lengths, default=0) if self._speculate else 0
        if not self._known(1) or not lengths:
            return 0
        for length in lengths:
            if not self._known(length + 1):
                return length
        best = max(lengths, key=lambda length: self._gain(length, acceptance.rate))
        return best if self._gain(best, acceptance.rate) > GAIN else 0

    def took(self, rows: int, seconds: float) -> None:
        """A run of so many tokens took so long. The last few runs count."""
        times = self._seconds.setdefault(rows, [])
        times.append(seconds)
        del times[: -4 * TRIALS]

    def _known(self, rows: int) -> bool:
        return len(self._seconds.get(rows, ())) >= TRIALS

    def _gain(self, length: int, rate: float) -> float:
        """Expected tokens of a run with a draft, over those of the same time without."""
        tokens = 1 + sum(rate**i for i in range(1, length + 1))
        return tokens * median(self._seconds[1]) / median(self._seconds[length + 1])
