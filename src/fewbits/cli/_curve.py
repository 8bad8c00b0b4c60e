"""A loss curve for the terminal: a dot for each place of the training, a circle where held-out text was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewbits.cli._print import number
from fewbits.results import LossPoint

ROWS = 12
TRAINED, HELD_OUT = "·", "o"


def curve(points: Sequence[LossPoint], width: int) -> str:
    """Losses, on a logarithmic scale, against steps; empty where there are fewer than two places."""
    drawn = [(p.step, value, marker) for p in points for value, marker in _values(p) if value > 0]
    if len({step for step, _, _ in drawn}) < 2:
        return ""
    low, high = min(value for _, value, _ in drawn), max(value for _, value, _ in drawn)
    last = max(step for step, _, _ in drawn)
    labels = [number(high * (low / high) ** (row / (ROWS - 1)), 3) for row in range(ROWS)]
    margin = max(map(len, labels))
    columns = max(10, width - margin - 3)
    cells = [[" "] * columns for _ in range(ROWS)]
    for step, value, marker in sorted(drawn, key=lambda each: each[2] == HELD_OUT):
        share = math.log(high / value) / math.log(high / low) if high > low else 0.0
        cells[round(share * (ROWS - 1))][round(step / last * (columns - 1))] = marker
    lines = [f"{label:>{margin}} ┤{''.join(row)}".rstrip() for label, row in zip(labels, cells, strict=True)]
    ruler = f"{'0':<{columns - len(str(last))}}{last}"
    key = f"steps   {TRAINED} on what is trained on   {HELD_OUT} on held-out text, nats a token"
    return "\n".join([*lines, f"{'':>{margin}} └{'─' * columns}", f"{'':>{margin}}  {ruler}", f"{'':>{margin}}  {key}"])


def _values(point: LossPoint) -> list[tuple[float, str]]:
    found = ((point.loss, TRAINED), (point.held_out, HELD_OUT))
    return [(value, marker) for value, marker in found if value is not None]
