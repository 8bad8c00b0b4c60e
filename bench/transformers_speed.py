"""How fast is a model that transformers loads in 4 bits, and what memory does it take, beside bitsandbytes?

    python bench/transformers_speed.py books=MODEL 1b=OUT --peer PYTHON

Each NAME=FOLDER is a model; a folder that is not there is made, a random Llama of 1.24 billion weights
(`random_llama.py`). PYTHON is an interpreter with bitsandbytes installed, which the project does not depend on. Both
sides load the same folder by `from_pretrained` in a process of their own, alternating, and run the same prompt: prefill
is `generate` of one token, decoding what further ones take. Peak memory is the process's, pages of the mapped file
included; held is what is left at the end without those.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

OURS, THEIRS = "fewbits", "bitsandbytes"
FIGURES = ("load", "prefill", "decode", "peak", "held")


def configuration(side: str, args: argparse.Namespace) -> Any:
    if side == OURS:
        import fewbits

        more = {"vocabulary": args.vocabulary} if args.vocabulary else {}
        return fewbits.Config(
            **more, method=args.method, **({"format": args.format} if args.format else {"load_in_4bit": True})
        )
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, args.dtype),
    )


def worker(args: argparse.Namespace) -> dict[str, float]:
    """Load one model on one side: seconds, tokens a second, MB."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began = time.perf_counter()
    chosen = configuration(args.worker, args)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.models[0], quantization_config=chosen, dtype=getattr(torch, args.dtype)
    )
    found = {"load": time.perf_counter() - began}
    prompt = torch.randint(10, 1000, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        generated(model, prompt, 2)
        found["prefill"] = args.prompt / generated(model, prompt, 1)
        seconds = [generated(model, prompt[:, :16], count) for count in (1, 1 + args.tokens)]
    found["decode"] = args.tokens / (seconds[1] - seconds[0])
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    found["held"] = held()
    return found


def held() -> float:
    """MB of the process's own memory now: without mapped pages of files, which the system can take back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def generated(model: Any, prompt: Any, count: int) -> float:
    """Seconds that it takes to continue a prompt by so many tokens."""
    began = time.perf_counter()
    model.generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return time.perf_counter() - began


def run(side: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    python = sys.executable if side == OURS else args.peer
    settings = ["--prompt", str(args.prompt), "--tokens", str(args.tokens), "--dtype", args.dtype]
    settings += ["--method", args.method]
    for name in ("format", "vocabulary"):
        settings += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    command = [python, __file__, folder, "--worker", side, *settings]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def made(folder: Path) -> None:
    """A random Llama at this path, if nothing is there."""
    if not folder.exists():
        subprocess.run([sys.executable, str(Path(__file__).with_name("random_llama.py")), str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="NAME=FOLDER, one or more")
    parser.add_argument("--peer", help="an interpreter that has bitsandbytes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are written")
    parser.add_argument("--dtype", default="bfloat16", help="of what is not quantized, and of activations")
    parser.add_argument("--format", help="of fewbits' side (default: that of load_in_4bit)")
    parser.add_argument("--vocabulary", help="format of embeddings and output projection, of fewbits' side")
    parser.add_argument("--method", default="rtn", help="of fewbits' side")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)))
        return
    sides = (OURS, THEIRS) if args.peer else (OURS,)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    print("model   side           load s  prefill t/s  decode t/s   peak MB    held MB")
    for name, _, folder in (model.partition("=") for model in args.models):
        made(Path(folder))
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.runs):
            for side in sides:
                runs[side].append(run(side, folder, args))
        figures[name] = {side: {f: median(one[f] for one in runs[side]) for f in FIGURES} for side in sides}
        for side, found in figures[name].items():
            print(f"{name:7} {side:13} " + " ".join(f"{found[f]:10.1f}" for f in FIGURES), flush=True)
        if args.peer:
            ratios = {f: figures[name][OURS][f] / figures[name][THEIRS][f] for f in FIGURES}
            print(f"{name:7} {'ratio':13} " + " ".join(f"{ratios[f]:10.2f}" for f in FIGURES), flush=True)
    print(json.dumps({"question": "transformers in 4 bits", "runs": args.runs, "figures": figures}))


if __name__ == "__main__":
    main()
