"""One text that is being made: its tokens, how the next one is chosen, when it ends, what of it is text already."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fewbits.engine.sampling import Sampling, choose, logprobs
from fewbits.engine.speculation import LENGTHS, Acceptance, Lookup
from fewbits.engine.streaming import StopStrings
from fewbits.engine.text import Text
from fewbits.errors import RequestError

Tokens = NDArray[np.int32]
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """A token, and the text that it completed: none, where a character or a stop string may have begun.

    logprob and top (token and its logarithm, most likely first) are natural logarithms of the model's own
    probabilities, where asked for. finish comes with the last piece: "stop" at an end token or a stop string, "length"
    where max_tokens or the context was reached.
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None


class Constraint(Protocol):
    """What a text has to look like: a grammar, say. It is told of every token, and used by one text alone."""

    def allowed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [vocabulary] with −inf for tokens that may not come next; others as they are."""

    def take(self, token: int) -> bool:
        """A token that has come; whether the text is complete with it, and nothing more may follow."""


@dataclass(frozen=True)
class Limits:
    """When a text ends, and what is told about its tokens.

    max_tokens: None for as many as the context holds. logprobs: None for none, else how many alternatives. signs:
    special tokens that are part of the text.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    signs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise RequestError(f"logprobs is {self.logprobs}; it must be 0 (the token's own) or more")


class Sequence:
    """A text in the making: `prompt` tokens [n] that were given, and those that followed.

    continues: its text goes on from the prompt's (rather than being an answer). Pieces wait in `pieces` to be fetched.
    Raises RequestError for a prompt without tokens, or longer than the context.
    """

    def __init__(
        self,
        prompt: Tokens,
        text: Text,
        context: int,
        sampling: Sampling,
        limits: Limits,
        *,
        continues: bool = True,
        constraint: Constraint | None = None,
    ) -> None:
        require_fit(len(prompt), context)
        self._tokens = np.empty(context + 1, np.int32)  # the last token need not be run
        self._tokens[: len(prompt)] = prompt
        self.prompt = self.length = len(prompt)
        self.done = 0  # tokens whose keys and values are in the slot
        self.reused = 0  # of those, how many were there before
        self.slot: int | None = None
        self.finish: Finish | None = None
        self.pieces: deque[Piece] = deque()
        self.acceptance = Acceptance()
        self._context, self._sampling, self._limits = context, sampling, limits
        self._rng, self._constraint = sampling.generator(), constraint
        self._ends = text.ends
        self._stream = text.stream(continues=continues, signs=limits.signs)
        self._stops = StopStrings(limits.stop)
        self._lookup, self._looked_up = Lookup(), 0

    @property
    def tokens(self) -> Tokens:
        """All tokens so far, the prompt's too: int32 [length]."""
        return self._tokens[: self.length]

    @property
    def ended(self) -> bool:
        return self.finish is not None

    @property
    def prefilled(self) -> bool:
        """Whether only the last token is left to be run."""
        return self.done >= self.length - 1

    def draft(self) -> list[int]:
        """What may come next, and would still fit: at most as many tokens as any draft has."""
        room = self._context - self.length
        left = self._limits.max_tokens
        if left is not None:
            room = min(room, left - (self.length - self.prompt) - 1)
        self._lookup.extend(self._tokens[self._looked_up : self.length].tolist())
        self._looked_up = self.length
        return self._lookup.draft(min(room, LENGTHS[0])) if room > 0 else []

    def advance(self, logits: NDArray[np.float32], draft: Listed[int]) -> None:
        """Take what a run of the last token and a draft (of none or more tokens) gave: logits [1 + draft, vocabulary].

        As many tokens are chosen as the draft was right about, and one more.
        """
        guess = self.draft()[:1] if not draft else list(draft)
        right = 0
        for place, row in enumerate(logits):
            token = self._next(row)
            expected = guess[place] if place < len(guess) else None
            right += token == expected
            if self.finish is not None or token != expected or place == len(draft):
                break
        self.done = self.length - 1
        if guess:
            self.acceptance.saw(right, wrong=right < len(guess) and self.finish is None)

    def _next(self, logits: NDArray[np.float32]) -> int:
        """Choose a token and write it down, with its piece."""
        allowed = logits if self._constraint is None else self._constraint.allowed(logits)
        token = choose(allowed, self.tokens, self._sampling, self._rng)
        told = self._limits.logprobs
        own, top = (None, ()) if told is None else logprobs(logits, token, told)
        self._tokens[self.length] = token
        self.length += 1
        self.pieces.append(Piece(token, self._text(token), own, top, self.finish))
        return token

    def _text(self, token: int) -> str:
        """The text that a token completes; decides whether it was the last one."""
        if token in self._ends:
            self.finish = "stop"
            return self._stops.push(self._stream.flush()) + self._rest()
        text = self._stops.push(self._stream.push(token))
        if self._stops.found is not None:
            self.finish = "stop"
            return text
        complete = self._constraint is not None and self._constraint.take(token)
        if complete or self._full():
            self.finish = "stop" if complete else "length"
            return text + self._stops.push(self._stream.flush()) + self._rest()
        return text

    def _rest(self) -> str:
        return "" if self._stops.found is not None else self._stops.flush()

    def _full(self) -> bool:
        most = self._limits.max_tokens
        return self.length > self._context or (most is not None and self.length - self.prompt >= most)


def require_fit(length: int, context: int) -> None:
    """Raise RequestError for a prompt without tokens, or longer than the context."""
    if length == 0:
        raise RequestError("the prompt has 0 tokens; give at least one")
    if length > context:
        raise RequestError(
            f"the prompt has {length} tokens, and the context holds {context}; shorten it or open the model with a "
            f"context of more than {length}"
        )
