"""Whether a checkpoint is the one that a cache was made of, told in milliseconds however large it is.

The fingerprint is a SHA-256 of the files' names, sizes and times of change, of small files' content and of samples of
large ones': their first 64 KiB (with the header of a safetensors or GGUF file, or its beginning), their last, and 16
pages between. It also covers the code that makes programs, so that a cache never outlives a change of it. Somebody who
writes other numbers into a file in place, of the same size, between the samples, and sets the time back is not found
out.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fewbits.errors import CheckpointError

CONTENT = ("*.safetensors", "*.json", "*.jinja", "adapter/*.safetensors", "adapter/*.json")
"""Files of a folder that a program or its tokenizer is made of; an adapter inside allows no program."""
PART = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")
ENDS, PAGE, SAMPLES = 1 << 16, 1 << 12, 16
SMALL = 1 << 25
"""Files up to here are read whole where they are text: a tokenizer has up to 20 MB."""


def fingerprint(path: Path) -> str:
    """In hex. Raises CheckpointError where nothing lies at the path."""
    digest = hashlib.sha256()
    for file in [*source_files(path), *_code()]:
        facts = file.stat()
        digest.update(f"{file.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
        _add(digest, file, facts.st_size)
    return digest.hexdigest()


def source_files(path: Path) -> list[Path]:
    """The files of a checkpoint: those of a folder, or a GGUF file and its further parts."""
    if path.is_dir():
        return sorted({file for pattern in CONTENT for file in path.glob(pattern)})
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the folder of a checkpoint or a GGUF file")
    first = PART.fullmatch(path.name)
    return sorted(path.parent.glob(f"{first[1]}-*-of-{first[2]}.gguf")) if first else [path]


def _code() -> list[Path]:
    engine = Path(__file__).parent
    modules = [
        engine / f"{name}.py"
        for name in ("composing", "parameters", "program_json", "repacked", "text_files", "tiling")
    ]
    runtime = [engine.parent / "runtime" / f"{name}.py" for name in ("ops", "tiles")]
    return [*modules, *runtime, *sorted((engine / "families").glob("*.py"))]


def _add(digest: hashlib._Hash, file: Path, size: int) -> None:
    with file.open("rb") as opened:
        if size <= 2 * ENDS or (size <= SMALL and file.suffix not in (".safetensors", ".gguf")):
            digest.update(opened.read())
            return
        digest.update(opened.read(ENDS))
        for i in range(1, SAMPLES + 1):
            opened.seek(size * i // (SAMPLES + 1))
            digest.update(opened.read(PAGE))
        opened.seek(size - ENDS)
        digest.update(opened.read(ENDS))
