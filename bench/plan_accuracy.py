"""How well a plan's divergence is predicted: random plans, quantized and measured.

    python bench/plan_accuracy.py MODEL --calibration CALIB.txt --text TEST.txt [--plans 20] [--json FILE]

The table is measured once on the calibration text. Each plan then draws a format for every tensor, around a coarseness
that is drawn first, so that the plans lie between 2 and 8 bits; it is quantized with the plan's method, and its
divergence measured on the test text. Printed are both, their ratio, and over all plans the rank correlation.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from scipy.stats import spearmanr

import fewbits
from fewbits.pipeline import Calibration, make_plan
from fewbits.plan.planned import Budget, Planned

SPREAD = 1.5  # options up and down from a plan's coarseness


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    calibration = Calibration(args.calibration, limit=float("inf"))
    made = make_plan(args.model, Budget(bpw=4.5), calibration=calibration, method=args.method)
    print("corrections", {role: round(factor, 2) for role, factor in made.corrections.items()}, "trial", made.trial)
    print("   MB   bits  predicted   measured  ratio")
    found, formats = [], []
    for seed in range(args.plans):
        drawn = randomly(made, random.Random(seed))
        measured = divergence(args.model, drawn, calibration, args.text)
        found.append((drawn.nbytes, drawn.divergence, measured))
        formats.append(dict(drawn.formats))
        ratio = drawn.divergence / measured
        sizes = f"{drawn.nbytes / 1e6:5.2f}  {drawn.bits_per_weight:5.2f}"
        print(f"{sizes}  {drawn.divergence:9.3e}  {measured:9.3e}  {ratio:5.2f}", flush=True)
    ratios = [predicted / measured for _, predicted, measured in found]
    rank = float(spearmanr([p for _, p, _ in found], [m for _, _, m in found]).statistic)
    print(f"predicted / measured: {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")
    print(f"rank correlation: {rank:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"plans": found, "rank": rank, "formats": formats}))


def randomly(made: Planned, draw: random.Random) -> Planned:
    """A plan with a format drawn for every unit; none is kept as it is."""
    coarse = draw.uniform(0, len(made.table.units[0].options) - 3)
    formats = {}
    for unit in made.table.units:
        options = sorted(unit.options, key=lambda option: option.nbytes)[:-1]
        index = round(coarse + draw.uniform(-SPREAD, SPREAD))
        formats[unit.name] = options[min(max(index, 0), len(options) - 1)].format
    return replace(made, formats=formats)


def divergence(model: Path, drawn: Planned, calibration: Calibration, text: Path) -> float:
    """Nats a token between the model quantized by this plan and the original, on the text."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.gguf"
        fewbits.quantize(model, out, plan=drawn, method=drawn.method, calibration=calibration, prove=False)
        return fewbits.evaluate(out, against=model, text=text).mean_kld.value


if __name__ == "__main__":
    main()
