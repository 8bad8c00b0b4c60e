"""Builds the kernels as a program of their own, without Python, and runs it: `python run.py arm|sanitize|threads`.

arm: ARMv8 with and without its dot products, against plain C++ for the same processor, under qemu.
sanitize: this machine's targets with the sanitizers of addresses and undefined behaviour.
threads: the pool and a program on it with the sanitizer of threads.

Ends with 0 where everything agrees, 1 where not, and 77 (as automake's tests do) where a tool is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "src" / "fewbits" / "runtime" / "csrc"
FLAGS = "-std=gnu++20 -fno-math-errno -fno-trapping-math -ffp-contract=fast"
WARNINGS = "-Wall -Wextra -Werror -Wno-psabi -Wno-unused-function"

OF_EACH_TARGET = [SOURCES / "ops_target.cpp", SOURCES / "target.cpp", HERE / "functions.cpp"]
TOGETHER = [SOURCES / f"{name}.cpp" for name in ("cache", "ops", "pool", "program")]
TOGETHER += [HERE / "pool.cpp", HERE / "program.cpp"]
COMMON = [*TOGETHER, HERE / "products.cpp", HERE / "main.cpp"]
THREADS = [*TOGETHER, HERE / "threads.cpp"]

WIDE = "-march=x86-64-v4 -mprefer-vector-width=512 -Wno-maybe-uninitialized"  # gcc 12 warns of its own intrinsics
X86 = {
    "generic": "-march=x86-64-v2",
    "avx2": "-march=x86-64-v3",
    "avxvnni": "-march=x86-64-v3 -mavxvnni",
    "avx512": WIDE,
    "avx512vnni": f"{WIDE} -mavx512vnni",
}
AVX2, AVX512 = ["avx2", "fma", "f16c"], ["avx512f", "avx512bw", "avx512vl", "avx512dq"]
NEEDS = {
    "generic": [],
    "avx2": AVX2,
    "avxvnni": [*AVX2, "avx_vnni"],
    "avx512": AVX512,
    "avx512vnni": [*AVX512, "avx512_vnni"],
}
ARM = {
    "generic": "-march=armv8-a -DFEWBITS_PORTABLE",
    "neon": "-march=armv8-a",
    "neondot": "-march=armv8.2-a+dotprod",
}


@dataclass(frozen=True)
class Build:
    """How a program is made and run. targets: flags by name, the one that the others are compared with first."""

    compiler: str
    flags: str
    targets: dict[str, str]
    run: tuple[str, ...] = ()
    common: tuple[Path, ...] = tuple(COMMON)

    def missing(self) -> list[str]:
        return [tool for tool in (self.compiler, *self.run[:1]) if shutil.which(tool) is None]

    def objects(self, folder: Path) -> list[tuple[Path, list[str]]]:
        """What is compiled, and how."""
        common = ["-DTARGETS=" + " ".join(f"X({name})" for name in self.targets)]
        found = [(folder / f"{source.parent.name}.{source.stem}.o", [str(source), *common]) for source in self.common]
        for name, flags in self.targets.items():
            own = [f"-DFEWBITS_TARGET={name}", f"-DFEWBITS_OPS={name}", *flags.split()]
            found += [(folder / f"{source.stem}.{name}.o", [str(source), *own]) for source in OF_EACH_TARGET]
        return found

    def program(self, folder: Path) -> Path:
        compile_one = [self.compiler, *FLAGS.split(), *WARNINGS.split(), *self.flags.split(), f"-I{SOURCES}"]
        objects = self.objects(folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda o: subprocess.run([*compile_one, "-c", *o[1], "-o", o[0]], check=True), objects))
        program = folder / "kernels"
        subprocess.run([self.compiler, *self.flags.split(), *(o for o, _ in objects), "-o", program], check=True)
        return program


def native() -> dict[str, str]:
    """The targets of x86 that this machine runs."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return {name: flags for name, flags in X86.items() if words.issuperset(NEEDS[name])}


def builds() -> dict[str, Build]:
    # -w: with them gcc cannot unroll some loops as it is asked to, and says so.
    sanitizers = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -w"
    return {
        "arm": Build("aarch64-linux-gnu-g++", "-O2 -static", ARM, ("qemu-aarch64-static", "-cpu", "max")),
        "sanitize": Build("g++", sanitizers, native()),
        "threads": Build("g++", "-O1 -fsanitize=thread -w", {"generic": X86["generic"]}, common=tuple(THREADS)),
    }


def main(name: str) -> int:
    build = builds()[name]
    if missing := build.missing():
        print(f"skipped: {name} needs {' and '.join(missing)}, which this machine lacks")
        return 77
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([*build.run, build.program(Path(folder))], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
