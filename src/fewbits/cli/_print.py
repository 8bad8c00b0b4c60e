"""What verbs print with: tables, sizes, a progress bar.

Tables are aligned columns without boxes; they wrap at the terminal's width and lose colour where stdout is no terminal.
GB are 10⁹ bytes and MB 10⁶, as on a disk's label.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

EXIT_CODES = """\
exit codes:
  0    all is well
  1    a proof failed: what stands in the files is not what was meant
  2    wrong usage
  3    bad input, an unsupported request, or an output that cannot be written
  130  interrupted (Ctrl-C)
"""
PIPE_WIDTH = 160  # columns where nobody measures: wide enough that no table is cut


def console() -> Console:
    """A console on stdout: the terminal's width, or PIPE_WIDTH without colour where there is no terminal."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    return Console(file=sys.stdout, highlight=False, width=width, force_terminal=False, color_system=None)


def printed(console: Console, show: Callable[[Console], None]) -> str:
    """What `show` prints, without the spaces that pad every line to the width."""
    with console.capture() as captured:
        show(console)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def error(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}")


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Rows under a heading. A column whose name starts with '>' is aligned to the right (numbers), '^' centred."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    aligned = {">": "right", "^": "center"}
    for column in columns:
        justify = aligned.get(column[:1], "left")
        name = column.lstrip(">^")
        fixed = justify != "left" or not made.columns
        made.add_column(name, justify=justify, no_wrap=fixed, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))  # never markup: names have [ ]
    return made


def size(count: float) -> str:
    """Bytes, to three or four digits: 3.5 GB, 14 GB, 812 MB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor * 0.99995:
            return f"{number(count / factor)} {unit}"
    return f"{count:.0f} B"


def count(n: float) -> str:
    """A count of weights: 7B, 1.24B, 494M, 260k."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor * 0.99995:
            return f"{number(n / factor)}{unit}"
    return f"{n:.0f}"


def number(x: float, digits: int = 4) -> str:
    """A number to so many significant digits, without trailing zeros, and without an exponent from 1e-4 to 1e6."""
    if x == 0:
        return "0"
    if 1e-4 <= abs(x) < 1e6:
        text = f"{x:.{digits}g}"
        if "e" in text:
            text = f"{x:.0f}"
        return text.replace("-", "−")
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


Progress = Callable[[int, int, str], None]
"""Told (done, total, label)."""


def speaks() -> bool:
    """Whether this process prints: of those that a launcher (torchrun) started together, the first does."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A callback progress(done, total, label) that draws a bar with the time left, on stderr; gone when it ends."""
    if not speaks():
        yield lambda done, total, label: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=escape(label))

        yield progress
