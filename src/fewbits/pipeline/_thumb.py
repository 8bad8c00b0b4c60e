"""Rules of thumb for the planner where there is no text: which matrices usually matter, by what they do.

The rise in divergence is proportional to a matrix's squared relative error, and by how much is alike from model to
model: values, attention outputs and the way down of a feed-forward about twice as much as the rest, and the vocabulary
as much as all blocks together. The figures below are those of a small Llama, measured (`fewbits plan` with text) and
divided by its number of blocks; what counts for a plan are their ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fewbits.methods.rtn import RoundToNearest
from fewbits.models import Piece, Role
from fewbits.pipeline._job import Job
from fewbits.pipeline._probe import role_of
from fewbits.pipeline._sensitivity import Costs
from fewbits.pipeline._source import read_rows, row_step
from fewbits.plan.rules import Choice

INSIDE = {
    **dict.fromkeys(("attn_v", "v_proj", "attn_output", "o_proj", "ffn_down", "down_proj"), 0.045),
    **dict.fromkeys(("attn_q", "q_proj", "attn_k", "k_proj", "ffn_gate", "gate_proj", "ffn_up", "up_proj"), 0.024),
}
"""Nats for each unit of squared relative error, over all blocks together."""
OTHERWISE = 0.035
OUTSIDE = {Role.EMBEDDING: 0.05, Role.OUTPUT: 0.25}
SAMPLED = 1 << 16
"""Weights of a matrix that are rounded to learn its errors."""


def costs_by_thumb(job: Job, choices: Mapping[str, Sequence[Choice]]) -> Costs:
    """Matrix -> format -> nats a token, roughly."""
    blocks = len({name.split(".")[1] for name in choices if name.startswith("blk.")}) or _layers(job)
    return {
        piece.name: _costs(job, piece, choices[piece.name], blocks) for piece in job.pieces if piece.name in choices
    }


def _layers(job: Job) -> int:
    return max(1, int(job.reader.config.get("num_hidden_layers", 1)))


@torch.no_grad()
def _costs(job: Job, piece: Piece, choices: Sequence[Choice], blocks: int) -> dict[str, float]:
    step = min(piece.shape[0], row_step(piece, SAMPLED))
    middle = (piece.shape[0] - step) // 2 // step * step
    w = read_rows(job.reader, piece, middle, middle + step).float()
    factor = OUTSIDE.get(piece.role) or INSIDE.get(role_of(piece.name), OTHERWISE) / blocks
    energy, found = float(w.square().sum()) or 1.0, {}
    for choice in choices:
        if choice.quantized:
            error = RoundToNearest().quantize(w, choice.format, {}).dequantize() - w
            found[choice.format.name] = factor * float(error.square().sum()) / energy
    return found
