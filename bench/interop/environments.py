"""An environment for each tool, from the package index; none of them is a dependency of fewbits.

    cd bench; python -m interop.environments PLACE [TOOL …]        makes PLACE/<tool>/bin/python

They share PLACE/base (torch, transformers and what those need), which each reads after its own packages. Tools are
installed without their dependencies, which would bring other versions of torch or CUDA packages of several gigabytes;
what they need besides is listed here. llama-cpp-python builds llama.cpp, in about 15 minutes of two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
TORCH = ("-c", str(CONSTRAINTS), "torch")  # first and alone: see the Makefile
BASE = (
    *("-c", str(CONSTRAINTS), "transformers", "accelerate", "datasets", "safetensors", "compressed-tensors", "gguf"),
    *("loguru", "scipy", "setuptools>=77,<83", "wheel", "ninja", "pillow", "protobuf", "jinja2", "rich"),
)
SOURCE = "--no-build-isolation"  # with the tools for building that are in the base
TOOLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gptqmodel": (
        ("device-smi", "logbar", "tokenicer", "defuser", "pypcre", "threadpoolctl", "torchao==0.18.0"),
        (SOURCE, "gptqmodel==7.6.0"),
    ),
    "autoawq": (
        ("transformers==4.51.3", "tokenizers==0.21.4", "huggingface-hub==0.36.0", "accelerate==1.6.0", "zstandard"),
        ("datasets==3.6.0", "dill==0.3.8", "multiprocess==0.70.16", "fsspec==2025.3.0"),
        (SOURCE, "autoawq==0.2.9"),
    ),
    "bitsandbytes": (("bitsandbytes==0.50.2",),),
    "mlx": (("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2", "sentencepiece"),),
    "llm_compressor": (("llmcompressor==0.14.0.1",),),
    "modelopt": (("nvidia-modelopt==0.47.0", "pulp", "nvidia-ml-py", "omegaconf", "antlr4-python3-runtime==4.9.3"),),
    "llama_cpp": (("scikit-build-core", "pathspec", "diskcache"), (SOURCE, "llama-cpp-python==0.3.36")),
}
"""Arguments of `pip install --no-deps`, in this order. `fine_grained_fp8` and `bitnet` need the base alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"default: {', '.join(TOOLS)}")
    args = parser.parse_args()
    unknown = sorted(set(args.tools) - TOOLS.keys())
    if unknown:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(TOOLS)}")
    base = args.place / "base"
    if not base.exists():
        make(base)
        install(base, TORCH)
        install(base, BASE)
    for tool in args.tools or TOOLS:
        make(args.place / tool)
        (packages(args.place / tool) / "base.pth").write_text(f"{packages(base).resolve()}\n")
        for wanted in TOOLS[tool]:
            install(args.place / tool, ("--no-deps", *wanted))


def make(environment: Path) -> None:
    """A virtual environment; its own setuptools, where it has one, would be older than the base's."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin/pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)


def packages(environment: Path) -> Path:
    return environment / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def install(environment: Path, wanted: tuple[str, ...]) -> None:
    print(f"{environment.name}: {' '.join(wanted)}", flush=True)
    subprocess.run([environment / "bin/pip", "install", "--quiet", *wanted], check=True)


if __name__ == "__main__":
    main()
