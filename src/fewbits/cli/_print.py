"""What verbs print with: tables, sizes, a progress bar.

Tables are aligned columns without boxes; they wrap at the terminal's width and lose colour where stdout is no terminal.
Numbers are written as reports write them (`report.numbers`).
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

from fewbits.report.numbers import count, number, size

__all__ = [
    "EXIT_CODES",
    "Progress",
    "console",
    "count",
    "error",
    "number",
    "printed",
    "progress_bar",
    "size",
    "speaks",
    "table",
]

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
