"""Tokens as text while they come: never half a character, never the beginning of a stop string.

A character may be spread over several tokens, and a token may end in the middle of one. So a token is turned into
*bytes*, and an incremental UTF-8 decoder gives them out character by character. Where a token's bytes come from depends
on the tokenizer's decoder:

    ByteLevel       GPT-2's alphabet of 256 printable characters that stand for bytes
    ByteFallback    tokens <0x00> … <0xFF> are bytes, all others text
    all others      text

The text of such a token is asked of the tokenizer itself, next to a token that goes before it, because of what decoders
do at the start of a text (a leading space is dropped) and between tokens (WordPiece's spaces). It is remembered, so a
token costs a look into a dictionary.

The pieces joined are what the tokenizer decodes the tokens to together, with one exception: where a model writes bytes
that are no character, ByteFallback makes � of every byte of the run, the good characters among them too. Those have
been given out by then, and stay.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The bytes of every token of a tokenizer, as far as they have been asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._level = _byte_level(_decoders(tokenizer))
        self._fallback = "ByteFallback" in _decoders(tokenizer)
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._known: dict[tuple[int, bool], bytes] = {}

    def shown(self, token: int) -> bool:
        """Whether a token is text, rather than a sign of the model's format."""
        return token not in self._special

    def name(self, token: int) -> str:
        """A token as the tokenizer's file writes it; a special one is its own text."""
        return str(self._tokenizer.id_to_token(token))

    def bytes_of(self, token: int, first: bool) -> bytes:
        """What a token adds to a text, or begins it with."""
        key = (token, first)
        if key not in self._known:
            self._known[key] = self._found(token, first)
        return self._known[key]

    def _found(self, token: int, first: bool) -> bytes:
        word = self._tokenizer.id_to_token(token)
        if word is None or not self.shown(token):
            return b""
        if self._level:
            return _leveled(word)
        byte = _BYTE.fullmatch(word) if self._fallback else None
        if byte and not (first and word == "<0x20>"):  # as the first of all it is the space that decoders drop
            return bytes.fromhex(byte[1])
        if first:
            return str(self._tokenizer.decode([token])).encode()
        anchor, before = self._anchor
        return str(self._tokenizer.decode([anchor, token]))[len(before) :].encode()

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token of letters, to stand before others, and its text."""
        added = self._tokenizer.get_added_tokens_decoder()
        words = ((i, self._tokenizer.id_to_token(i)) for i in range(self._tokenizer.get_vocab_size()) if i not in added)
        anchor = next((i for i, word in words if word and word.isascii() and word.isalpha()), 0)
        return anchor, str(self._tokenizer.decode([anchor]))


class Detokenizer:
    """Tokens in, text out. continues: the text goes on from another one, so nothing is dropped at its start.

    signs: special tokens that are part of this text (where a tool call begins, say).
    """

    def __init__(self, vocabulary: Vocabulary, *, continues: bool, signs: frozenset[int] = frozenset()) -> None:
        self._vocabulary, self._first, self._signs = vocabulary, not continues, signs
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        if token in self._signs:
            return self._decoder.decode(b"") + self._vocabulary.name(token)
        if not self._vocabulary.shown(token):
            return ""
        data, self._first = self._vocabulary.bytes_of(token, self._first), False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: � where a character was begun."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Text in, text out up to the first stop string, which may come in several parts.

    What could still become one is held back until it does or does not.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What is certain to come before any stop string. `found` tells which one has come."""
        if not self._stops:
            return text
        text, self._held = self._held + text, ""
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.found = min(places, key=lambda found: (found[0], -len(found[1])))
            return text[:place]
        cut = len(text) - max(overlap(text, stop) for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back and will not become a stop string any more."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _decoders(tokenizer: Tokenizer) -> list[str]:
    """Types of the tokenizer's decoders, in order."""
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


def _byte_level(kinds: list[str]) -> bool:
    return kinds == ["ByteLevel"]


def _leveled(word: str) -> bytes:
    """The bytes of a word in GPT-2's alphabet; a word with other characters in it (an added token) is itself."""
    if all(character in _BYTES for character in word):
        return bytes(_BYTES[character] for character in word)
    return word.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes of Latin-1 are themselves, the others the characters from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _alphabet()
