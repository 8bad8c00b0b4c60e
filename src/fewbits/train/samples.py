"""Samples to fine-tune on, from a file of lines of JSON, packed into windows with the loss where it belongs.

    {"messages": [{"role": …, "content": …}, …]}    a conversation, rendered by the model's own template: the loss is on
                                                     what the assistant says
    {"prompt": …, "completion": …}                   the loss is on the completion
    {"text": …}                                      the loss is on all of it

Samples follow each other in a window, each with positions from 0 on, by which transformers keeps them from reading one
another; what is left of a window is filled up without loss.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fewbits.errors import CheckpointError
from fewbits.train.data import Rows

IGNORED = -100
"""The label of a token that is no target, as torch's cross entropy has it."""
SHOWN = 5
"""Lines that an error names."""


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each whether it is a target."""

    ids: list[int]
    targets: list[bool]


@dataclass(frozen=True)
class Samples:
    """What a file holds. empty, cut: the numbers of lines that were empty, and of samples that did not fit a window."""

    samples: tuple[Sample, ...]
    empty: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know."""
        found = ((self.empty, "empty lines were passed over"), (self.cut, "samples were cut to a window's length"))
        return tuple(f"{len(lines)} {what}: lines {_listed(lines)}" for lines, what in found if lines)


def read_samples(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Samples:
    """All samples of a .jsonl file, none longer than `length` tokens.

    Raises CheckpointError, with the numbers of the lines, where lines are no samples, or there are none.
    """
    found, problems, empty, cut = list[Sample](), list[tuple[int, str]](), list[int](), list[int]()
    for number, line in _lines(path):
        if not line.strip():
            empty.append(number)
            continue
        try:
            sample = _sample(json.loads(line), tokenizer)
        except (ValueError, _NoSampleError) as error:
            problems.append((number, str(error)))
            continue
        if len(sample.ids) > length:
            cut.append(number)
            sample = Sample(sample.ids[:length], sample.targets[:length])
        if any(sample.targets[1:]):  # the first token has nothing to be predicted from
            found.append(sample)
        elif number not in cut:
            problems.append((number, "nothing in it is a target; is there an answer?"))
    if problems or not found:
        raise CheckpointError(_refused(path, problems))
    return Samples(tuple(found), tuple(empty), tuple(cut))


class PackedSamples(Rows):
    """Samples packed into windows of `length` tokens, in an order that the seed decides."""

    def __init__(self, samples: Sequence[Sample], length: int, pad: int, seed: int = 0) -> None:
        order = list(samples)
        random.Random(seed).shuffle(order)
        self._windows = list(_packed(order, length))
        self._length, self._pad = length, pad

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels, positions = list[int](), list[int](), list[int]()
        for sample in self._windows[index]:
            ids += sample.ids
            # A sample's first token would be predicted from the sample before it.
            targets = [False, *sample.targets[1:]]
            labels += [token if target else IGNORED for token, target in zip(sample.ids, targets, strict=True)]
            positions += range(len(sample.ids))
        left = self._length - len(ids)
        columns = {
            "input_ids": [*ids, *[self._pad] * left],
            "labels": [*labels, *[IGNORED] * left],
            "position_ids": [*positions, *range(left)],
        }
        return {name: torch.tensor(values) for name, values in columns.items()}


def _packed(samples: Sequence[Sample], length: int) -> Iterator[list[Sample]]:
    """Samples in order, as many to a window as fit."""
    window, used = list[Sample](), 0
    for sample in samples:
        if window and used + len(sample.ids) > length:
            yield window
            window, used = [], 0
        window.append(sample)
        used += len(sample.ids)
    if window:
        yield window


class _NoSampleError(Exception):
    """Why a line is no sample."""


def _sample(row: Any, tokenizer: PreTrainedTokenizerBase) -> Sample:
    if not isinstance(row, dict):
        raise _NoSampleError('is no object; each line is one, such as {"text": "…"}')
    if "messages" in row:
        return _conversation(row["messages"], tokenizer)
    if "prompt" in row or "completion" in row:
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        before = tokenizer(prompt, verbose=False)["input_ids"]
        after = [*_plain(tokenizer, completion), *_end(tokenizer)]
        return Sample([*before, *after], [False] * len(before) + [True] * len(after))
    ids = [*tokenizer(_string(row, "text"), verbose=False)["input_ids"], *_end(tokenizer)]
    return Sample(ids, [True] * len(ids))


def _conversation(messages: Any, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The whole conversation; targets are what the template puts behind the turns that ask the assistant to speak."""
    if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
        raise _NoSampleError('its "messages" are no list of {"role": …, "content": …}')
    if not getattr(tokenizer, "chat_template", None):
        raise _NoSampleError("is a conversation, and this model has no chat template; give prompt and completion")
    ids, targets = _rendered(tokenizer, messages), list[bool]()
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:i], add_generation_prompt=True)
        after = _rendered(tokenizer, messages[: i + 1])
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise _NoSampleError("its template renders earlier turns differently once later ones follow")
        targets += [False] * (len(before) - len(targets)) + [True] * (len(after) - len(before))
    return Sample(ids, targets + [False] * (len(ids) - len(targets)))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **more: Any) -> list[int]:
    try:
        text = str(tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=False, **more))
    except Exception as error:  # templates raise what they like
        raise _NoSampleError(f"is refused by the model's chat template: {error}") from error
    return _plain(tokenizer, text)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _string(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        has = ", ".join(map(repr, row)) or "nothing"
        raise _NoSampleError(f'has no string "{field}" (it has {has})')
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); name an existing file") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text ({error.reason}); convert it first") from error


def _refused(path: Path, problems: Sequence[tuple[int, str]]) -> str:
    if not problems:
        return f'{path}: holds no sample; each line is one, such as {{"text": "…"}}'
    named = "; ".join(f"line {number}: {what}" for number, what in problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more lines" if len(problems) > SHOWN else ""
    return f"{path}: {len(problems)} lines are no samples. {named}{more}"


def _listed(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(map(str, lines[:SHOWN])) + more
