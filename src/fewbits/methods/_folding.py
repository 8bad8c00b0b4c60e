"""Factors that move between neighbours: what AWQ and SmoothQuant have in common.

A layer that reads x · s⁻¹ with weights W · s computes what it computed before. s multiplies the columns of all
consumers; s⁻¹ goes into whatever makes x: a norm's weight, or the rows (and the bias) of the linear layer before.
Matrices are quantized by row and group, so a factor on a whole row costs nothing: only the consumers' error changes,
and a search needs to look at nothing else.

Norms and biases stay in floating point, often with the 8 significant bits of BF16, where a factor is rounded. So a
norm's new weight is rounded to 8 bits first, and the factor is what it then really is: old weight over new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fewbits.errors import UnsupportedError
from fewbits.formats import Format
from fewbits.methods._parallel import in_parallel
from fewbits.methods.block import Block, Stats
from fewbits.models import Link

LARGEST = 1e4
"""Factors stay within 1/LARGEST … LARGEST, so that no FP16 weight overflows or becomes zero by them."""
LEAST_ROWS = 16
"""Of a matrix, where a search looks at some of its rows only."""


@dataclass(frozen=True)
class Consumer:
    """A matrix w [..., N, K] that reads a link, its format, and the statistics of what it reads."""

    w: Tensor
    format: Format
    stats: Mapping[str, Tensor]


class Search(Protocol):
    """Chooses factors [K] for the consumers of a link; `link` says which of their channels share one."""

    def __call__(self, link: Link, consumers: Sequence[Consumer]) -> Tensor: ...


def fold_all(method: str, block: Block, plan: Mapping[str, Format], stats: Stats, search: Search) -> None:
    """Search factors for every link of the block with a quantized consumer, and move them.

    Links do not meet: the channels of one are columns of its consumers and rows of its producer, and factors on rows
    change no other link's search. Raises UnsupportedError if the block has no links.
    """
    if not block.links:
        raise UnsupportedError(
            f"{method}: {block.name or 'this block'} is of an architecture for which it is not known what feeds what; "
            f"leave {method} out (gptq and signround need no such knowledge)"
        )
    found = [(link, list(consumers_of(block, link, plan, stats))) for link in block.links]
    searched = [(link, consumers) for link, consumers in found if consumers]
    factors = in_parallel([partial(search, link, consumers) for link, consumers in searched])
    for (link, _), s in zip(searched, factors, strict=True):
        fold(block, link, s)


def consumers_of(block: Block, link: Link, plan: Mapping[str, Format], stats: Stats) -> Iterator[Consumer]:
    """The link's consumers that are quantized; of a fused parameter the link's expert, or all of them."""
    for name, slot in block.slots.items():
        if slot.parameter not in link.consumers:
            continue
        w, found = block.matrix(name), stats[name]
        if link.expert is not None and slot.expert is None:
            yield Consumer(w[link.expert], plan[name], {key: value[link.expert] for key, value in found.items()})
        elif link.expert in (None, slot.expert):
            yield Consumer(w, plan[name], found)


def shared(link: Link, per_channel: Tensor) -> Tensor:
    """The largest value [C] of the channels [..., K] that share a factor: several heads may read the same values."""
    heads: Tensor = per_channel.unflatten(-1, (-1, link.repeats, link.head))
    return heads.amax(-2).flatten(-2)


def spread(link: Link, s: Tensor) -> Tensor:
    """A factor for each of the consumers' channels [K], from one for each of the producer's [C]."""
    heads: Tensor = s.unflatten(0, (-1, 1, link.head))
    return heads.expand(-1, link.repeats, -1).flatten()


def mean_over(values: Sequence[Tensor]) -> Tensor:
    """The mean [K] of several matrices' values [..., K] for each channel, every matrix counting alike."""
    return torch.stack([value.reshape(-1, value.shape[-1]).mean(0) for value in values]).mean(0)


def some_rows(consumers: Sequence[Consumer], rows: int) -> list[Consumer]:
    """The consumers with about so many rows in all, evenly spaced; whole matrices where rows share scales."""
    each = max(LEAST_ROWS, rows // len(consumers))
    return [replace(c, w=_every_nth(c.w, each)) if c.format.rowwise else c for c in consumers]


def _every_nth(w: Tensor, rows: int) -> Tensor:
    return w[..., :: max(1, w.shape[-2] // rows), :].contiguous()


def normalised(s: Tensor) -> Tensor:
    """Positive factors about 1 (the geometric mean of the extremes), 1 where a channel is dead, within LARGEST."""
    alive = (s > 0) & s.isfinite()
    if not alive.any():
        return torch.ones_like(s)
    centre = (s[alive].amax() * s[alive].amin()).sqrt()
    return torch.where(alive, s / centre, torch.ones_like(s)).clamp(1 / LARGEST, LARGEST)


@torch.no_grad()
def fold(block: Block, link: Link, s: Tensor) -> None:
    """Divide the producer's channels by s [C] and multiply the consumers', in place."""
    producer = block.parameters[link.producer]
    s = _fold_into_norm(producer, link.offset, s) if link.kind == "norm" else _fold_into_linear(block, link, s)
    for name in link.consumers:
        w = block.parameters[name]
        (w if link.expert is None else w[link.expert]).mul_(spread(link, s))


def _fold_into_norm(weight: Tensor, offset: float, s: Tensor) -> Tensor:
    """Divide a norm's weight; the factors that it takes once its new weight has 8 significant bits."""
    before = weight + offset
    stored = (before / s - offset).to(torch.bfloat16).to(weight.dtype)
    after = stored + offset
    movable = (before != 0) & (after != 0) & (after.sign() == before.sign())
    weight.copy_(torch.where(movable, stored, weight))
    return torch.where(movable, before / after, torch.ones_like(s))


def _fold_into_linear(block: Block, link: Link, s: Tensor) -> Tensor:
    weight = block.parameters[link.producer]
    weight = weight if link.expert is None else weight[link.expert]
    (weight[slice(*link.rows)] if link.rows else weight).div_(s.unsqueeze(-1))
    bias = block.parameters.get(link.producer.removesuffix("weight") + "bias")
    if bias is not None and link.expert is None:
        bias.div_(s)
    return s
