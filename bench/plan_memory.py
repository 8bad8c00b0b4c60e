"""Does a process that runs a planned file stay under the memory that was asked for, and near it?

    python bench/plan_memory.py MODEL --memory 1.1GB --context 4096 --python PYTHON

Plans MODEL for `--memory` by rules of thumb, quantizes it by rounding (`rtn-plain`: sizes do not depend on it), and
runs it in llama.cpp (llama-cpp-python, in the interpreter PYTHON) without mapping the file and with flash attention:
a prompt that fills the context, then a few tokens. Its peak of resident memory is compared with what was asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import fewbits
from fewbits.cli.plan import amount
from fewbits.pipeline import make_plan
from fewbits.plan.planned import Budget

RUN = """
import random, sys
from llama_cpp import Llama
path, context = sys.argv[1], int(sys.argv[2])
model = Llama(path, n_ctx=context, use_mmap=False, flash_attn=True, verbose=False)
draw = random.Random(0)
model.eval([draw.randrange(5, model.n_vocab()) for _ in range(context - 8)])
for _ in range(4):
    model.eval([7])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def main() -> None:
    """Parse, plan, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", type=amount, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--python", required=True, help="an interpreter that has llama-cpp-python")
    args = parser.parse_args()
    made = make_plan(args.model, Budget(memory=args.memory, context=args.context), calibration=None)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.gguf"
        fewbits.quantize(args.model, out, plan=made, method="rtn-plain", prove=False)
        done = subprocess.run(
            [args.python, "-c", RUN, str(out), str(args.context)], capture_output=True, text=True, check=True
        )
    peak = 1024 * int(done.stdout.split()[-1])
    share = peak / args.memory
    print(
        f"asked for {args.memory / 1e6:.1f} MB; file {made.nbytes / 1e6:.1f} MB ({made.bits_per_weight:.2f} bits a "
        f"weight), expected process {made.memory / 1e6:.1f} MB; measured {peak / 1e6:.1f} MB, {share:.3f} of it"
    )
    print(json.dumps({"asked": args.memory, "file": made.nbytes, "expected": made.memory, "measured": peak}))


if __name__ == "__main__":
    main()
