"""Windows of tokens to evaluate on: from a text file, or written by the original model itself.

A text is tokenized once, as one stream without special tokens, and cut from its start into windows that do not overlap.
Where the tokenizer itself puts a beginning-of-sequence token before a text, every window starts with one, because such
a model has never seen a text without it (llama.cpp does the same); elsewhere a window is nothing but text. The first
token of a window is context only: a window of n tokens gives n − 1 predictions.

The documents of a table (`documents`: .jsonl, .parquet, the hub) follow each other with a special token between them:
the beginning token where the tokenizer uses one, else the end-of-text token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.evals.divergence import require_numbers
from fewbits.evals.documents import HUB, documents, readable

LENGTH = 256
WINDOWS = 24
BATCH = 32
"""Windows that a model writes at once: more are faster, and their caches take more memory."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids, int64 [windows, length], and where they come from: in words, and as it was named (a path, `self`)."""

    ids: Tensor
    description: str
    source: str = "given as tokens"

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and their arrangement."""
        return hashlib.sha256(repr(list(self.ids.shape)).encode() + self.ids.long().numpy().tobytes()).hexdigest()


def read_windows(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, windows: int = WINDOWS, length: int = LENGTH
) -> Windows:
    """The first `windows` windows of a text: a table as `documents` reads it, or a file of plain text in UTF-8.

    A shorter text gives fewer windows. Raises CheckpointError, with the line's number where there is one, if the text
    cannot be read or does not fill one window.
    """
    source = str(source)
    begin = beginning(tokenizer)
    step = length - (begin is not None)
    stream = _stream(source, tokenizer, begin, windows * step)
    found = min(windows, len(stream) // step)
    if found == 0:
        raise CheckpointError(
            f"{source} has {len(stream)} tokens, too few for a window of {length}; give a longer text or shorter "
            "windows"
        )
    ids = torch.tensor(stream[: found * step]).view(found, step)
    if begin is not None:
        ids = torch.cat([torch.full((found, 1), begin), ids], dim=1)
    name = source if source.startswith(HUB) else Path(source).name
    return Windows(ids, f"{name}, {found} windows of {length} tokens")


def beginning(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-sequence token, if this tokenizer puts one before a text."""
    begin: int | None = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else None


@torch.no_grad()
def self_text(
    model: PreTrainedModel,
    windows: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Windows:
    """Text that the model writes by drawing every token from its own distribution, `BATCH` windows at once.

    Needs no file, and lies where the model's knowledge lies. The same seed, model, device and dtype give the same text.
    Raises UnsupportedError if the configuration names no token to begin with.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    first, parts = _first_token(model), list[Tensor]()
    for start in range(0, windows, BATCH):
        count = min(BATCH, windows - start)
        columns = [torch.full((count, 1), first, device=model.device)]
        for column in islice(_drawn(model, columns[0], generator), length - 1):
            columns.append(column)
            if progress is not None:
                progress(start * length + count * len(columns), windows * length, "text")
        parts.append(torch.cat(columns, dim=1).cpu())
    return Windows(torch.cat(parts), f"written by the original (seed {seed}), {windows} windows of {length} tokens")


def _drawn(model: PreTrainedModel, tokens: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The tokens [B, 1] that follow these, one step after the other, without end."""
    cache = None
    while True:
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1].float(), output.past_key_values
        require_numbers(logits, str(model.name_or_path))
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        yield tokens


def _first_token(model: PreTrainedModel) -> int:
    """The token that begins a text, or the one that ends the text before it."""
    config = model.config.get_text_config()
    for token in (config.bos_token_id, config.eos_token_id):
        first = token[0] if isinstance(token, list) and token else token
        if isinstance(first, int):
            return first
    raise UnsupportedError(
        f"{model.name_or_path}: config.json has neither bos_token_id nor eos_token_id, so there is no token to begin a "
        "text with; name a text file"
    )


def _stream(source: str, tokenizer: PreTrainedTokenizerBase, begin: int | None, needed: int) -> list[int]:
    """At least `needed` token ids from the start of the text, or all of it."""
    found = documents(source)
    if found is None:
        return _plain(Path(source), tokenizer, needed)
    between = begin if begin is not None else tokenizer.eos_token_id
    stream: list[int] = []
    for document in found:
        if stream and between is not None:
            stream.append(between)
        stream += _encode(tokenizer, document)
        if len(stream) >= needed:
            break
    return stream


def _plain(path: Path, tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """Only as much of the text as it takes: 16 characters a token, then twice that, until there are enough.

    A token may change where a text is cut off, so the last ones of a part are not counted.
    """
    characters, unsure = 16 * needed, 64
    while True:
        text = _read(path, characters)
        ids = _encode(tokenizer, text)
        if len(text) < characters or len(ids) >= needed + unsure:
            return ids
        characters *= 2


def _read(path: Path, characters: int) -> str:
    with readable(path), path.open(encoding="utf-8") as file:
        return file.read(characters)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
