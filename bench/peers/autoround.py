"""auto-round: signed-gradient descent on rounding and clipping, a block at a time (SignRound).

Options: `iters` (200 is its default, 50 its light recipe), `lr`, `batch_size`; `extension` for its own extension of the
algorithm at few bits (`enable_alg_ext`); `amp` for BF16 arithmetic, which it would choose itself and is slower on most
CPUs. It runs with deterministic algorithms and leaves decoded numbers in the layers.
"""

from __future__ import annotations

from typing import Any

from auto_round import AutoRound
from transformers import AutoTokenizer

from peers.harness import Decode, Prepared, Request, main, weights_of


def prepare(request: Request) -> Prepared:
    model = request.load()
    options = request.options
    batch = int(options.get("batch_size", 8))
    more: dict[str, Any] = {"lr": float(options["lr"])} if "lr" in options else {}
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request.model),
        bits=request.bits,
        group_size=request.group,
        sym=request.flag("symmetric", True),
        iters=int(options.get("iters", 200)),
        dataset=[{"input_ids": ids} for ids in request.ids.split(batch)],
        seqlen=request.ids.shape[1],
        nsamples=len(request.ids),
        batch_size=batch,
        enable_alg_ext=request.flag("extension", False),
        amp=request.flag("amp", False),
        enable_deterministic_algorithms=True,
        device_map="cpu",
        **more,
    )

    def quantize() -> Decode:
        made, _ = rounder.quantize()
        return lambda: weights_of(made)

    return quantize


if __name__ == "__main__":
    main("auto-round", prepare)
