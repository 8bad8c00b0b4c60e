"""What does each width cost in quality, rounded to nearest, with plain and with searched scales?

Every row is a whole run: quantize to files, verify them, evaluate what stands in them against the original.

    python bench/quality.py MODEL --text FILE [--formats int8 int4-g32 …]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import fewbits

LADDER = ("int8", "int6-g32", "int5-g32", "int4-g32", "int4-g128", "int3-g32", "int2-g32")
METHODS = ("rtn-plain", "rtn")


def measure(model: Path, text: Path | None, format: str, method: str) -> dict[str, float | str]:
    """Quantize, verify and evaluate in a scratch folder."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / (f"{format}.gguf" if format.startswith("q") else format)
        made = fewbits.quantize(model, out, format=format, method=method)
        seen = fewbits.evaluate(out, against=model, text=text)
    return {
        "format": format,
        "method": method,
        "bits_per_weight": round(made.bits_per_weight, 3),
        "mean_kld": seen.mean_kld.value,
        "mean_kld_error": seen.mean_kld.error,
        "top1": seen.top1_agreement.value,
        "perplexity": seen.perplexity.value,
        "perplexity_ratio": seen.perplexity_ratio.value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="text that nothing was calibrated on; by default the model's own")
    parser.add_argument("--formats", nargs="+", default=LADDER)
    args = parser.parse_args()
    rows = [measure(args.model, args.text, format, method) for format in args.formats for method in METHODS]
    print(f"{'format':<12}{'method':<11}{'bits/w':>8}{'mean KLD':>22}{'top-1':>8}{'perplexity':>12}{'ratio':>8}")
    for r in rows:
        print(
            f"{r['format']:<12}{r['method']:<11}{r['bits_per_weight']:>8.2f}"
            f"{r['mean_kld']:>12.2e} ± {r['mean_kld_error']:.0e}{r['top1']:>8.3f}"
            f"{r['perplexity']:>12.3f}{r['perplexity_ratio']:>8.4f}"
        )
    print(json.dumps({"bench": "quality", "model": args.model.name, "rows": rows}))


if __name__ == "__main__":
    main()
