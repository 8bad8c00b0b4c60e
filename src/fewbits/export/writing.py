"""The graph on the disk: one file, or one of the graph and one of its tensors, OUT.onnx.data.

Protobuf ends at 2 GB and is built in memory, where its bytes stand twice. So a model of more than WHOLE bytes has its
tensors in the second file, to which they are written one after the other: what is in memory is one of them, up to five
bytes for each of its weights while it is unpacked.

Both are written in a folder beside the output and get their names when they are on the disk and were found right.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewbits.checkpoint._writer import disk_errors, flush_folder, refuse_existing, require_space

WHOLE = 1 << 28
"""Bytes of tensors up to which they lie in the graph's own file."""
Progress = Callable[[int, int, str], None]


def data_file(out: Path) -> Path:
    """Where the tensors of a large model lie."""
    return out.with_name(f"{out.name}.data")


@contextmanager
def written(graph: Any, out: Path, progress: Progress | None = None) -> Iterator[Path]:
    """Write a graph (onnx_ir.Model); gives the path at which it lies until the block ends well, when it moves to `out`.

    Raises OutputError where `out` exists or the disk is full; then, and if the block raises, nothing is left.
    """
    import onnx_ir as ir

    refuse_existing(out)
    refuse_existing(data_file(out))
    nbytes = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    folder = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        require_space(out.parent, nbytes)
        folder.mkdir()
    try:
        with disk_errors(out):
            beside = data_file(out).name if nbytes > WHOLE else None
            ir.save(graph, folder / out.name, external_data=beside, callback=_told(progress) if beside else None)
        yield folder / out.name
        with disk_errors(out):
            flush_folder(folder)
            for file in sorted(folder.iterdir(), reverse=True):  # the tensors before the graph that names them
                file.rename(out.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _told(progress: Progress | None) -> Callable[[Any, Any], None] | None:
    if progress is None:
        return None
    return lambda tensor, place: progress(place.index, place.total, "writing")
