"""`fewbits plan`: which format each tensor should have, for the least damage within a budget."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fewbits.cli._print import count, number, progress_bar, size, table
from fewbits.errors import UnsupportedError

if TYPE_CHECKING:
    from fewbits.plan.planned import Budget, Explanation, Planned

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DEFAULT = Path("plan.json")


@dataclass(frozen=True)
class Made:
    """A plan, where it was written (None if it was only asked about), and what was to be explained."""

    plan: Planned
    path: Path | None
    explained: tuple[Explanation, ...]


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="spend a budget of bits where they matter",
        description="Measure what each format of each tensor costs, and choose the best ones within a budget.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or a plan.json to plan anew from")
    parser.add_argument("--out", type=Path, default=DEFAULT, metavar="FILE", help="default %(default)s")
    add_budget(parser.add_argument_group("budget", "one of them"))
    parser.add_argument("--target", default="gguf", help="what will run it: gguf, vllm, cpu (default %(default)s)")
    parser.add_argument("--method", default="gptq", help="that it will be quantized with (default %(default)s)")
    parser.add_argument("--formats", metavar="A,B,…", help="to choose from, instead of the target's")
    parser.add_argument(
        "--calibration",
        default="self",
        metavar="TEXT",
        help="what costs are measured on: a file, self (text that the model writes; the default), or none "
        "(rules of thumb)",
    )
    parser.add_argument("--windows", type=int, default=128, help="of text (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda (default %(default)s)")
    parser.add_argument("--no-probes", action="store_true", help="do not correct predictions by true divergences")
    parser.add_argument("--explain", metavar="REGEX", help="say why tensors got their formats, and what more would buy")
    parser.set_defaults(run=run, show=show)


def add_budget(group: argparse._ArgumentGroup) -> None:
    """--memory, --size, --bpw, --max-kld, of which one may be given, and --context."""
    one = group.add_mutually_exclusive_group()
    one.add_argument("--memory", type=amount, metavar="6GB", help="of the process that runs it, with --context tokens")
    one.add_argument("--size", type=amount, metavar="4.5GB", help="of the file")
    one.add_argument("--bpw", type=float, metavar="4.25", help="bits a weight, everything in the file counted")
    one.add_argument("--max-kld", type=float, metavar="0.02", help="the smallest model this near to the original, nats")
    group.add_argument("--context", type=int, default=8192, help="tokens, for --memory (default %(default)s)")


def budget_of(args: argparse.Namespace) -> Budget:
    from fewbits.plan.planned import Budget

    return Budget(size=args.size, bpw=args.bpw, memory=args.memory, max_kld=args.max_kld, context=args.context)


def amount(text: str) -> float:
    """Bytes: 6GB, 4.5 GiB, 500MB."""
    found = re.fullmatch(r"([0-9.]+)\s*([KMGT]?i?B)", text.strip(), re.IGNORECASE)
    try:
        return float(found[1]) * UNITS[found[2].upper()] if found else float(text)
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no size, such as 6GB, 4.5GB or 800MB") from error


def run(args: argparse.Namespace) -> Made:
    from fewbits.pipeline import Calibration, plan
    from fewbits.plan.planned import read_plan, write_plan

    if Path(args.model).suffix == ".json":
        found = read_plan(Path(args.model))
        if any((args.size, args.bpw, args.memory, args.max_kld)):
            found = found.within(budget_of(args))
        elif args.explain:
            return Made(found, None, _matching(found, args.explain))
    else:
        text = None if args.calibration == "none" else args.calibration
        with progress_bar() as progress:
            found = plan(
                args.model,
                budget_of(args),
                target=args.target,
                method=args.method,
                calibration=text
                and Calibration(text=text, windows=args.windows, length=args.length, device=args.device),
                candidates=args.formats and args.formats.split(","),
                probe=not args.no_probes,
                progress=progress,
            )
    write_plan(found, args.out)
    return Made(found, args.out, _matching(found, args.explain) if args.explain else ())


def _matching(plan: Planned, pattern: str) -> tuple[Explanation, ...]:
    from fewbits.plan.planned import explained

    units = [u.name for u in plan.table.units if any(re.search(pattern, name) for name in (u.name, *u.tensors))]
    if not units:
        raise UnsupportedError(f"--explain {pattern}: no tensor that the plan chooses a format for matches it")
    return tuple(explained(plan, name) for name in units)


def show(made: Made, console: Console) -> None:
    plan = made.plan
    console.print(table(("format", ">tensors", ">weights", ">bytes", ">nats"), _by_format(plan)))
    console.print(
        f"\n[bold]{size(plan.nbytes)}[/], {number(plan.bits_per_weight)} bits a weight; expected "
        f"{number(plan.divergence, 3)} nats a token from the original"
    )
    measured = f"measured on {plan.measured_on}" if plan.measured_on else "by rules of thumb: give --calibration text"
    console.print(f"costs {measured}{_corrected(plan.corrections)}", markup=False)
    for found in made.explained:
        _explain(found, plan, console)
    if made.path:
        console.print(f"\n{made.path}: fewbits quantize {plan.model} OUT --plan {made.path}", markup=False)


def _by_format(plan: Planned) -> list[tuple[str, ...]]:
    tensors, weights, nbytes, nats = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for unit in plan.table.units:
        format = plan.formats[unit.name]
        tensors[format] += len(unit.tensors)
        weights[format] += unit.weights
        nbytes[format] += unit.option(format).nbytes
        nats[format] += unit.option(format).divergence  # type: ignore[assignment]
    rows = [(f, str(tensors[f]), count(weights[f]), size(nbytes[f]), number(nats[f], 3)) for f in tensors]
    return sorted(rows, key=lambda row: -nbytes[row[0]] / weights[row[0]])


def _corrected(corrections: Mapping[str, float]) -> str:
    if not corrections:
        return ""
    factors = ", ".join(f"{role} ×{number(factor, 2)}" for role, factor in corrections.items())
    return f"; corrected by true divergences: {factors}"


def _explain(found: Explanation, plan: Planned, console: Console) -> None:
    unit = found.unit
    console.print(f"\n[bold]{unit.name}[/], {count(unit.weights)} weights")
    rows = [
        ("→" if option.format == found.format else "", option.format, size(option.nbytes), number(option.divergence, 3))
        for option in unit.options
    ]
    console.print(table(("", "format", ">bytes", ">nats"), rows))
    price = f"{number(found.price * 1e6, 3)} nats a MB" if found.dearer else "nothing"
    if found.next is None or found.step is None:
        console.print(f"It has the best format there is; elsewhere a further MB would save {price}.")
        return
    where = "which is the best use of a further byte" if found.dearer == unit.name else f"{found.dearer}: {price}"
    more = size(found.next.nbytes - unit.option(found.format).nbytes)
    console.print(
        f"{found.next.format} would take {more} more and save {number(found.step * 1e6, 3)} nats a MB; " + where,
        markup=False,
    )
