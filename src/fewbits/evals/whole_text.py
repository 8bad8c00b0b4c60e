"""All of a text as windows of tokens, to train on: what `read_windows` does for the few windows of an evaluation.

A text is tokenized in pieces of a megabyte, cut at line ends, several at a time on all cores: its size is bounded by
the disk and not by what a tokenizer holds in memory. Documents of a table follow each other with the token that
separates documents; windows do not overlap, and no token is left out but the last ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fewbits.errors import CheckpointError
from fewbits.evals.documents import HUB, documents, readable
from fewbits.evals.text import LENGTH, Windows, beginning

PIECE = 1 << 20
"""Characters."""
TOGETHER = 16
"""Pieces or documents that are tokenized at once."""


def read_all(source: str | Path, tokenizer: PreTrainedTokenizerBase, length: int = LENGTH) -> Windows:
    """Windows of `length` tokens of all of a text; the source is what `read_windows` takes.

    Raises CheckpointError, with the line's number where there is one, if it cannot be read or does not fill a window.
    """
    source, begin = str(source), beginning(tokenizer)
    between = begin if begin is not None else tokenizer.eos_token_id
    step = length - (begin is not None)
    parts, total = list[NDArray[np.int32]](), 0
    pieces = _pieces(source)
    while group := list(islice(pieces, TOGETHER)):
        texts = [text for text, _ in group]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for (_, begins), ids in zip(group, encoded, strict=True):
            separator = [between] if begins and total and between is not None else []
            parts.append(np.array([*separator, *ids], np.int32))
            total += len(parts[-1])
    count = total // step
    if count == 0:
        raise CheckpointError(f"{source} has {total} tokens, too few for a window of {length}; give a longer text")
    ids = torch.from_numpy(np.concatenate(parts)[: count * step].astype(np.int64)).view(count, step)
    if begin is not None:
        ids = torch.cat([torch.full((count, 1), begin), ids], dim=1)
    name = source if source.startswith(HUB) else Path(source).name
    return Windows(ids, f"{name}, {count} windows of {length} tokens", source)


def _pieces(source: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether a document begins there."""
    found = documents(source)
    if found is not None:
        yield from ((document, True) for document in found)
        return
    path, begins = Path(source), True
    with readable(path), path.open(encoding="utf-8") as file:
        while lines := file.readlines(PIECE):
            yield "".join(lines), begins
            begins = False
