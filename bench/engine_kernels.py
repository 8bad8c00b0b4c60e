"""How close do products of integers come to what the machine can do, by shape, bits, group and rows of inputs?

One row of inputs is bound by reading the weight, so its figure is GB/s and its share of the bandwidth of memory; many
rows are bound by arithmetic, so theirs is giga-operations a second (a multiplication and an addition are two) and their
share of the integer peak. A round goes through so many copies of the matrix that no cache holds them. Rounding of the
inputs to INT8 is part of the product. Codes are random, scales FP16; a group of 0 is a whole row.

    python bench/engine_kernels.py [--shapes 2048x2048 8192x2048 2048x8192] [--bits 2 3 4 5 6 8] [--groups 32 128 0]
        [--rows 1 8 64 512] [--threads N] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from fewbits.evals.speed import limits
from fewbits.runtime.compiled import compiled, cores, kernel_weight, targets
from fewbits.runtime.tiles import BLOCK, PANEL, Direct, Tiles, blocks, groups, panels

TOGETHER = 1 << 27
"""Bytes of all copies of a matrix."""


def shape(text: str) -> tuple[int, int]:
    """`8192x2048`: out_features, in_features."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


def random_tiles(rows: int, columns: int, bits: int, group: int) -> Tiles:
    draw = np.random.default_rng(0)
    group = group or blocks(columns) * BLOCK
    codes = draw.integers(0, 256, (panels(rows), blocks(columns), bits * 64), np.uint8)
    scale = draw.uniform(0.01, 0.02, (panels(rows), groups(columns, group), PANEL)).astype(np.float16)
    return Tiles(rows, columns, bits, group, 1 << (bits - 1), codes, Direct(scale))


def copies(tiles: Tiles) -> list[Any]:
    """Weights of the kernels, each with codes and scales of its own; at least two."""
    assert isinstance(tiles.scale, Direct)
    values = tiles.scale.values
    many = range(max(2, TOGETHER // tiles.nbytes))
    return [kernel_weight(replace(tiles, codes=tiles.codes.copy(), scale=Direct(values.copy()))) for _ in many]


def measure(args: argparse.Namespace, peak: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    core = compiled()
    assert core is not None
    for (rows, columns), bits, group in product(args.shapes, args.bits, args.groups):
        tiles = random_tiles(rows, columns, bits, group)
        weights = copies(tiles)
        for inputs in args.rows:
            seconds = core.time_multiply(args.target, args.threads, weights, inputs, args.rounds)
            read, done = tiles.nbytes / seconds, 2 * inputs * rows * columns / seconds
            yield {
                "out_features": rows,
                "in_features": columns,
                "bits": bits,
                "group": group,
                "rows": inputs,
                "microseconds": seconds * 1e6,
                "gigabytes_per_second": read / 1e9,
                "bandwidth_part": read / bandwidth,
                "gigaoperations_per_second": done / 1e9,
                "peak_part": done / peak,
            }


def line(r: dict[str, Any]) -> str:
    size = f"{r['out_features']}×{r['in_features']}"
    return (
        f"{size:<12}{r['bits']:>5}{r['group'] or 'row':>7}{r['rows']:>6}{r['microseconds']:>11.1f}"
        f"{r['gigabytes_per_second']:>9.2f}{r['bandwidth_part']:>8.0%}"
        f"{r['gigaoperations_per_second']:>10.1f}{r['peak_part']:>8.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(2048, 2048), (8192, 2048), (2048, 8192)])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128, 0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512], help="of inputs")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", default=next(iter(targets()), None), help="whose kernels (default: the best)")
    args = parser.parse_args()
    if args.target is None:
        raise SystemExit("there are no compiled kernels to measure; install fewbits with a C++20 compiler and CMake")
    peak, bandwidth = limits(args.target, args.threads)
    machine = {"target": args.target, "threads": args.threads, "integer_peak": peak, "read_bandwidth": bandwidth}
    print(f"{args.target}, {args.threads} threads: {peak / 1e9:.0f} GOPS, {bandwidth / 1e9:.1f} GB/s at most\n")
    print(f"{'shape':<12}{'bits':>5}{'group':>7}{'rows':>6}{'µs':>11}{'GB/s':>9}{'part':>8}{'GOPS':>10}{'part':>8}")
    rows = []
    for row in measure(args, peak, bandwidth):
        print(line(row), flush=True)
        rows.append(row)
    print(json.dumps({"bench": "engine_kernels", **machine, "rows": rows}))


if __name__ == "__main__":
    main()
