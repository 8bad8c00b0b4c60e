"""A process that opens a checkpoint, writes one token and says what it has in memory: how long a start takes.

    python -m fewbits.engine.first_token OUT --tokens 5 17 3 … --prompt-tokens 512

The token's number is printed as soon as it is known, so that whoever started the process can take the time, the
interpreter's own start included. Then a prompt is run, so that all buffers are as large as they get, and one line of
JSON has the bytes in memory: `weights` mapped from the cache file, and `other`; nulls where the system does not tell.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import psutil
from numpy.typing import NDArray

from fewbits.engine.engine import Engine
from fewbits.engine.repacked import NAME
from fewbits.runtime.runner import Runner


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--kv", default="f16")
    args = parser.parse_args()
    engine = Engine(args.out, threads=args.threads, context=args.context, kv=args.kv)
    (piece,) = engine.stream(args.tokens, max_tokens=1, temperature=0)
    print(piece.token, flush=True)
    prefill(engine.runner, np.resize(np.array(args.tokens, np.int32), args.prompt_tokens))
    print(json.dumps(in_memory()))


def prefill(runner: Runner, tokens: NDArray[np.int32]) -> None:
    """Run a prompt in slot 0, in as few calls as it takes, for the logits behind its last token."""
    positions = np.arange(len(tokens), dtype=np.int32)
    for start in range(0, len(tokens), runner.most_rows):
        part = slice(start, start + runner.most_rows)
        rows = len(tokens[part])
        last = [rows - 1] if start + rows == len(tokens) else []
        runner.forward(tokens[part], np.zeros(rows, np.int32), positions[part], np.array(last, np.int32))


def in_memory() -> dict[str, int | None]:
    """Bytes of this process in memory: of the mapped weights, and all others."""
    process = psutil.Process()
    if not hasattr(process, "memory_maps"):  # macOS keeps that to itself
        return {"weights": None, "other": None}
    weights = sum(region.rss for region in process.memory_maps() if region.path.endswith(NAME))
    return {"weights": weights, "other": process.memory_info().rss - weights}


if __name__ == "__main__":
    main()
