"""`fewbits plan`: which format each tensor should have, for the least damage within a budget."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fewbits.cli._frontier import draw_terminal
from fewbits.cli._print import count, number, progress_bar, size, table
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.results import FrontierPoint

if TYPE_CHECKING:
    from fewbits.plan.planned import Budget, Explanation, Planned

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DEFAULT = Path("plan.json")


@dataclass(frozen=True)
class Made:
    """A plan, where it was written (None if it was only asked about), what was to be explained, what to be drawn."""

    plan: Planned
    path: Path | None
    explained: tuple[Explanation, ...]
    points: tuple[FrontierPoint, ...]
    image: Path | None = None


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
    parser.add_argument("--no-trial", action="store_true", help="nor by a trial of the plan, half of the time")
    parser.add_argument("--explain", metavar="REGEX", help="say why tensors got their formats, and what more would buy")
    parser.add_argument(
        "--frontier",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw size against divergence, with presets; into a .png, .svg or .pdf too",
    )
    parser.add_argument("--peers", type=Path, metavar="FILE", help="measured files to draw beside it (JSON)")
    parser.set_defaults(run=run, show=show)


def add_budget(group: argparse._ArgumentGroup) -> None:
    """--memory, --size, --bpw, --max-kld, of which one may be given, and --context."""
    one = group.add_mutually_exclusive_group()
    one.add_argument("--memory", type=amount, metavar="6GB", help="of the process that runs it, with --context tokens")
    one.add_argument("--size", type=amount, metavar="4.5GB", help="of the file")
    one.add_argument("--bpw", type=float, metavar="4.25", help="bits a weight, everything in the file counted")
    one.add_argument("--preset", metavar="NAME", help="no budget but llama.cpp's mixture: Q4_K_M, Q5_K_M, IQ4_XS …")
    one.add_argument("--max-kld", type=float, metavar="0.02", help="the smallest model this near to the original, nats")
    group.add_argument("--context", type=int, default=8192, help="tokens, for --memory (default %(default)s)")


def budget_of(args: argparse.Namespace) -> Budget:
    from fewbits.plan.planned import Budget

    return Budget(args.size, args.bpw, args.memory, args.max_kld, args.preset, args.context)


def has_budget(args: argparse.Namespace) -> bool:
    return any(value is not None for value in (args.size, args.bpw, args.memory, args.max_kld, args.preset))


def amount(text: str) -> float:
    """Bytes: 6GB, 4.5 GiB, 500MB."""
    found = re.fullmatch(r"([0-9.]+)\s*([KMGT]?i?B)", text.strip(), re.IGNORECASE)
    try:
        return float(found[1]) * UNITS[found[2].upper()] if found else float(text)
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no size, such as 6GB, 4.5GB or 800MB") from error


def run(args: argparse.Namespace) -> Made:
    from fewbits.pipeline import Calibration, make_plan
    from fewbits.plan.planned import read_plan, refuse_existing, write_plan

    if Path(args.model).suffix == ".json":
        found = read_plan(Path(args.model))
        if has_budget(args):
            found = found.within(budget_of(args))
        elif args.explain or args.frontier is not None:
            return _made(found, None, args)
    else:
        refuse_existing(args.out)  # before the measuring, which may take hours
        text = None if args.calibration == "none" else args.calibration
        with progress_bar() as progress:
            found = make_plan(
                args.model,
                budget_of(args),
                target=args.target,
                method=args.method,
                calibration=text
                and Calibration(text=text, windows=args.windows, length=args.length, device=args.device),
                candidates=args.formats and args.formats.split(","),
                probe=not args.no_probes,
                trial=not args.no_trial,
                progress=progress,
            )
    write_plan(found, args.out)
    return _made(found, args.out, args)


def _made(plan: Planned, path: Path | None, args: argparse.Namespace) -> Made:
    """What was asked about a plan besides; its picture is drawn here, because `show` writes no files."""
    from fewbits.cli._frontier import draw_image
    from fewbits.plan.planned import expected

    explained = _matching(plan, args.explain) if args.explain else ()
    if args.frontier is None:
        return Made(plan, path, explained, ())
    points = (*expected(plan), *(_peers(args.peers) if args.peers else ()))
    image = Path(args.frontier) if args.frontier else None
    if image is not None:
        draw_image(points, image, f"{plan.model}: size against divergence", _caption(plan))
    return Made(plan, path, explained, points, image)


def _peers(path: Path) -> tuple[FrontierPoint, ...]:
    """[{"name": …, "nbytes": …, "divergence": …}, …]."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            FrontierPoint(str(p["name"]), int(p["nbytes"]), float(p["divergence"]), "peer", measured=True)
            for p in found
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is no list of objects with name, nbytes and divergence ({type(error).__name__}: {error})"
        ) from error


def _caption(plan: Planned) -> str:
    text = f"measured on {plan.measured_on}" if plan.measured_on else "by rules of thumb"
    return f"Expected divergence of the model quantized with {plan.method}, costs {text}."


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
    if plan.trial is not None:
        console.print(f"and by a trial of a whole plan: ×{number(plan.trial, 2)}", markup=False)
    for found in made.explained:
        _explain(found, plan, console)
    if made.points:
        console.print("\n" + draw_terminal(made.points, min(console.width, 110), 24), markup=False)
    if made.image:
        console.print(f"\ndrawn: {made.image}", markup=False)
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
