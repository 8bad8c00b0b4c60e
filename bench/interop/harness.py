"""What the scripts of all tools share: folders and files in, the tool's own numbers and logits out.

Each script runs in its tool's environment, which needs nothing of fewbits. They are modules of this package, because a
script named after the library that it imports would import itself:

    cd bench; PEER/bin/python -m interop.mlx write MODEL OUT [--only SETTING …]   the tool writes OUT/<setting>
              PEER/bin/python -m interop.mlx run FOLDER …                         the tool loads what anybody wrote

Both leave `FOLDER.safetensors` beside each folder: every weight as the tool decodes it, in float32, by the names of the
file, and `logits` [64, vocabulary] of the tokens 2 … 65 as the tool computes them, in float32. `python -m
interop.compare FOLDER …` then holds them against what fewbits reads and runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

TOKENS = range(2, 66)
LOGITS = "logits"
INPUT, OUTPUT = ".input", ".output"  # of a layer that rounds its inputs
Numbers = dict[str, NDArray[np.float32]]
Write = Callable[[Path, Path, Mapping[str, Any]], None]
"""(model, what to make, a setting's values) → the folder or file, by the tool."""
Run = Callable[[Path], Numbers]
"""(what anybody made) → weights by name, and `logits` where the tool runs it."""


@dataclass(frozen=True)
class Tool:
    """packages: whose versions are written down, the tool itself first. ending: of what it writes."""

    packages: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    write: Write
    run: Run
    ending: str = ""

    def main(self) -> None:
        args = self.arguments()
        if args.verb == "run":
            for folder in args.folders:
                self.keep(folder)
            return
        args.out.mkdir(parents=True, exist_ok=True)
        failed = [name for name in args.only if not self.make(args.model, args.out / f"{name}{self.ending}", name)]
        sys.exit(f"not written: {', '.join(failed)}" if failed else 0)

    def arguments(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
        verbs = parser.add_subparsers(dest="verb", required=True)
        write = verbs.add_parser("write", help="let the tool quantize MODEL in each of its settings")
        write.add_argument("model", type=Path)
        write.add_argument("out", type=Path)
        write.add_argument("--only", nargs="*", default=list(self.settings), choices=list(self.settings))
        verbs.add_parser("run", help="let the tool load folders").add_argument("folders", type=Path, nargs="+")
        return parser.parse_args()

    def make(self, model: Path, out: Path, setting: str) -> bool:
        """Whether the tool could: what one setting cannot do must not hide the others."""
        try:
            self.write(model, out, self.settings[setting])
            self.keep(out)
        except Exception as error:
            print(f"{setting}: {type(error).__name__}: {error}", file=sys.stderr)
            return False
        return True

    def keep(self, folder: Path) -> None:
        numbers = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in self.run(folder).items()}
        versions = ", ".join(f"{package} {version(package)}" for package in self.packages)
        save_file(numbers, f"{folder}.safetensors", metadata={"tool": versions})
        print(json.dumps({"folder": folder.name, "tool": versions, "arrays": len(numbers)}), flush=True)
