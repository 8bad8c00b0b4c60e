"""Can any damage to a checkpoint make a reader do anything but refuse it in a sentence?

For each kind small sound checkpoints are made (`fuzz_seeds`), in one format of each sort that it holds, then damaged
(`fuzz_mutations`) and opened: `fewbits inspect`, every tensor read and decoded, whole and by a row, and hashed. Allowed
is success, or a FewbitsError. Not allowed is any other exception, the end of the process, more than `--limit` seconds,
or memory beyond the checkpoint's size and 64 MB. (Decoding makes FP32 of less than 16 bits, and these files are too
small for that to show; whatever goes beyond follows a number in a file instead of the file.)

    python bench/fuzz_readers.py [--minutes 10] [--kinds gptq awq …] [--seed 0] [--failures FOLDER]
    python bench/fuzz_readers.py --case gptq:123 --seed 0 --failures FOLDER     one case again, as it was, and kept

Readers run in a process of their own, whose address space may grow by 2 GB, so that a greedy one fails by itself. Peak
memory is the kernel's (VmHWM, reset before each case) less what was resident before, with free memory given back first.
Prints a table and one JSON line; the exit status is 1 if anything failed. A failing case is kept with what was done to
it; of failures in the same place, the first three.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import fuzz_mutations
import fuzz_seeds
from fewbits.checkpoint import KINDS, open_checkpoint
from fewbits.cli import inspect
from fewbits.errors import FewbitsError

MARGIN, ROOM = 64 << 20, 2 << 30
KEPT = 3  # cases of one failure


@dataclass
class Tally:
    """What happened to the cases of one kind. slowest: seconds of processor time; most_memory: bytes."""

    kind: str
    cases: int = 0
    refused: int = 0
    read_whole: int = 0
    failed: int = 0
    slowest: float = 0.0
    most_memory: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def add(self, found: dict[str, Any]) -> None:
        self.cases += 1
        self.refused += found["outcome"] == "refused"
        self.read_whole += found["outcome"] == "read"
        self.slowest = max(self.slowest, found["seconds"])
        self.most_memory = max(self.most_memory, found["memory"])
        if found["outcome"] == "failed":
            self.failed += 1
            self.failures[found["where"]] = self.failures.get(found["where"], 0) + 1


def main() -> None:
    args = arguments()
    if args.worker:
        work()
        return
    if args.case:
        kind, _, number = args.case.partition(":")
        tallies = [fuzz(args, kind, iter([int(number)]), keep_all=True)]
    else:
        tallies = [fuzz(args, kind, within(args.minutes)) for kind in args.kinds]
    print(
        f"{'kind':<20}{'cases':>9}{'refused':>9}{'read whole':>12}{'failed':>8}"
        f"{'slowest, s':>12}{'most memory, MB':>17}"
    )
    for t in tallies:
        memory = t.most_memory / 1e6
        print(f"{t.kind:<20}{t.cases:>9}{t.refused:>9}{t.read_whole:>12}{t.failed:>8}{t.slowest:>12.2f}{memory:>17.1f}")
    print(json.dumps({"bench": "fuzz_readers", "seed": args.seed, "kinds": [asdict(t) for t in tallies]}))
    raise SystemExit(any(t.failed for t in tallies))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that a case may take")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--case", help="KIND:NUMBER")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def within(minutes: float) -> Iterator[int]:
    """0, 1, 2 … until the time is over."""
    end, number = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        yield number
        number += 1


def fuzz(args: argparse.Namespace, kind: str, numbers: Iterator[int], *, keep_all: bool = False) -> Tally:
    """Cases of one kind; each is decided by the seed, the kind and its number alone."""
    tally = Tally(kind)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        seeds = fuzz_seeds.checkpoints(KINDS[kind], Path(scratch) / "seeds")
        worker = Worker(seeds)
        for number in numbers:
            rng = random.Random(f"{args.seed} {kind} {number}")
            path = copied(rng.choice(seeds), Path(scratch) / "case")
            done = fuzz_mutations.damaged(path, rng)
            found = worker.opened(path, args.limit)
            tally.add(found)
            if keep_all or (found["outcome"] == "failed" and tally.failures[found["where"]] <= KEPT):
                keep(args, Path(scratch) / "case", f"{kind}-{number}", f"{done}\n\n{found}\n\n{found.get('trace', '')}")
        worker.stop()
    print(f"{kind}: {tally.cases} cases, {tally.failed} failed {tally.failures}", file=sys.stderr, flush=True)
    return tally


def copied(seed: Path, case: Path) -> Path:
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(seed.parent, case)
    return case / seed.name


def keep(args: argparse.Namespace, case: Path, name: str, report: str) -> None:
    target = args.failures / f"{name}-seed-{args.seed}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(case, target)
    (target / "report.txt").write_text(report)


class Worker:
    """A process that opens what it is told to, begun again whenever it dies or is too slow."""

    def __init__(self, seeds: list[Path]) -> None:
        self._seeds = seeds
        self._start()

    def opened(self, path: Path, limit: float) -> dict[str, Any]:
        """outcome: read, refused or failed; seconds, memory; where it failed."""
        answer = self._asked(path, limit)
        if isinstance(answer, dict):
            return answer
        self._process.kill()
        self._process.wait()
        self._start()
        return {"outcome": "failed", "where": answer, "seconds": limit, "memory": 0}

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        command = [sys.executable, __file__, "--worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._asked(self._seeds[0], 300)  # what is imported on the way counts as memory
        for seed in self._seeds:
            first = self._asked(seed, 300)
            if not isinstance(first, dict) or first["outcome"] != "read":
                raise SystemExit(f"{seed} is no sound checkpoint: {first}")

    def _asked(self, path: Path, limit: float) -> dict[str, Any] | str:
        """The answer, or why there is none."""
        into, out = self._process.stdin, self._process.stdout
        assert into is not None
        assert out is not None
        into.write(f"{path}\n".encode())
        into.flush()
        ready, _, _ = select.select([out], [], [], limit)
        line = out.readline() if ready else b""
        if not ready:
            return f"more than {limit:g} s"
        return json.loads(line) if line else "the process ended"


def work() -> None:
    """Open every path that comes in a line, and answer each with a line."""
    answers, sys.stdout = sys.stdout, Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for as long as it runs
    limited = False
    for number, line in enumerate(sys.stdin):
        if number and not limited:  # everything is imported by now
            resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ROOM, resource.RLIM_INFINITY))
            gc.freeze()  # collecting garbage before each case would take longer than the case
            limited = True
        print(json.dumps(judged(Path(line.rstrip("\n")))), file=answers, flush=True)


def judged(path: Path) -> dict[str, Any]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    found: dict[str, Any] = {"outcome": "read"}
    try:
        read_everything(path)
    except FewbitsError as error:
        found = {"outcome": "refused", "message": str(error)[:300]}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "fewbits" in f.filename] or [last]
        where = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        found = {"outcome": "failed", "where": where, "trace": "".join(traceback.format_exception(error))[-4000:]}
    seconds, grown = time.process_time() - start, memory("VmHWM") - before
    size = sum(p.stat().st_size for p in path.parent.rglob("*") if p.is_file())
    if found["outcome"] != "failed" and grown > size + MARGIN:
        found = {"outcome": "failed", "where": f"{grown >> 20} MB for {size >> 10} KB"}
    return found | {"seconds": seconds, "memory": grown}


def read_everything(path: Path) -> None:
    inspect.show(inspect.run(argparse.Namespace(path=path)), Console(file=sys.stdout))
    _, reader = open_checkpoint(path)
    for name, entry in reader.entries.items():
        reader.read(name).dequantize()
        if entry.shape and entry.format.rowwise:
            reader.read(name, slice(0, 1)).dequantize()
        reader.digests(name)


def memory(line: str) -> int:
    """A line of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(entry for entry in status if entry.startswith(f"{line}:")).split()[1]) << 10


if __name__ == "__main__":
    main()
