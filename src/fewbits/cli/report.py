"""`fewbits report`: everything that is known of a checkpoint on one page."""

from __future__ import annotations

import argparse
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fewbits.cli._print import number, progress_bar, size
from fewbits.errors import OutputError
from fewbits.findings import Report

PAGE_MARKER = '<meta name="generator" content="fewbits report">'


@dataclass(frozen=True)
class Reported:
    """What was gathered, and the files that were written."""

    report: Report
    page: str
    card: str | None
    picture: str | None
    base_model: str | None

    @property
    def passed(self) -> bool:
        """Whether the checkpoint's proof, if there is one, holds."""
        return self.report.verification is None or self.report.verification.passed


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report",
        help="one page that shows it all: bits, errors, predictions, memory, speed, ledger",
        description="Write an HTML file that shows what a checkpoint is made of, what it lost and how it was made. It "
        "asks nothing of a network.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="any checkpoint that fewbits reads")
    parser.add_argument("--against", metavar="MODEL", help="the original: measures what was lost")
    parser.add_argument("--text", type=Path, metavar="FILE", help=".txt or .jsonl; by default the original writes it")
    parser.add_argument("--windows", type=int, default=24, help="how many windows of text (default %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="that predictions are compared on (default %(default)s)")
    parser.add_argument("--no-speed", action="store_true", help="do not measure speed and energy")
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="default: report.html in the folder, or NAME.report.html beside a file"
    )
    parser.add_argument("--markdown", action="store_true", help="a model card too, as README.md in the same place")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="the original on the hub, for the card")
    parser.add_argument("--png", action="store_true", help="a picture of the page too; needs Chromium")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    parser.set_defaults(run=run, show=show)


def run(args: argparse.Namespace) -> Reported:
    from fewbits.pipeline._report import Wanted, gather
    from fewbits.report.card import MARKER, card
    from fewbits.report.page import page
    from fewbits.report.picture import browser, picture

    path, beside = places(args.out, args.to)
    _require_own(path, PAGE_MARKER)
    if args.markdown:
        _require_own(beside, MARKER)
    drawn = path.with_suffix(".png") if args.png else None
    if drawn is not None:
        browser()  # before the measuring, which may take long
        if drawn.exists() and not path.exists():
            raise OutputError(f"{drawn}: exists, and no report wrote it; move it away")
    wanted = Wanted(args.text, args.windows, args.length, device=args.device, speed=not args.no_speed)
    with progress_bar() as progress:
        found = gather(args.out, args.against, wanted, progress)
    text = page(found)
    _write(path, text)
    if args.markdown:
        _write(beside, card(found, args.base_model))
    if drawn is not None:
        picture(text, drawn)
    if args.open:
        webbrowser.open(path.absolute().as_uri())
    base = args.base_model or found.base_model
    return Reported(
        found, str(path), str(beside) if args.markdown else None, None if drawn is None else str(drawn), base
    )


def places(out: Path, to: Path | None) -> tuple[Path, Path]:
    """Where the page and the card go."""
    if out.is_dir():
        return to or out / "report.html", out / "README.md"
    return to or out.with_suffix(".report.html"), out.with_suffix(".README.md")


def _require_own(path: Path, marker: str) -> None:
    """Raise OutputError where there is a file that an earlier report did not write."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else marker
    except OSError as error:
        raise OutputError(f"{path}: cannot be replaced ({error.strerror}); choose another place") from error
    if marker not in text[:4096]:
        raise OutputError(f"{path}: exists, and no report wrote it; move it away")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); give another place with --to") from error
    finally:
        partial.unlink(missing_ok=True)


def show(result: Reported, console: Console) -> None:
    found = result.report
    console.print(f"{size(found.nbytes)}, {number(found.bits_per_weight)} bits a weight", markup=False)
    if found.predictions is not None:
        lost = found.predictions.evaluation
        console.print(
            f"mean KL divergence {lost.mean_kld:.3g} nats, top-1 agreement {lost.top1_agreement:.4f}", markup=False
        )
    if not result.passed and found.verification is not None:
        console.print(f"not as meant: {found.verification.mismatches[0]}", style="red", markup=False)
    for path in filter(None, (result.page, result.card, result.picture)):
        console.print(path, markup=False)
    if result.card and result.base_model is None:
        console.print("the card names no base_model; give it with --base-model OWNER/NAME", style="dim", markup=False)
