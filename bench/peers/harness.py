"""What every runner shares: the same windows in, a model out, and one JSON line about the run.

A peer quantizes a model in memory, with float32 arithmetic, and hands back every matrix that it changed, decoded to
float32. Nothing is lost that way, and every peer is evaluated by the same code whatever its own file type is. Runners
are modules of this package, because a script named after the library that it imports would import itself:

    cd bench; PEER/bin/python -m peers.hqq MODEL OUT --ids IDS.npy --bits 4 --group 64 [--option name=value …]

`seconds` is the quantization alone, calibration included; imports, and a peer's loading and saving, are not. `peak_mb`
is the most that the process had in memory until then. An option is whatever the peer's own library calls it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Request:
    """What to make. ids: calibration windows, int64 [windows, length]; group: numbers that share a scale."""

    model: Path
    out: Path
    ids: Tensor
    bits: int
    group: int
    options: Mapping[str, str]

    def load(self) -> PreTrainedModel:
        """In float32, in eval mode."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return model

    def flag(self, name: str, default: bool) -> bool:
        return {"true": True, "false": False}[self.options.get(name, str(default)).lower()]


Decode = Callable[[], Mapping[str, Tensor]]
"""Gives the changed parameters of a quantized model, by name, as numbers."""
Prepared = Callable[[], Decode | None]
"""Does the quantization, which is what is timed; None if that wrote the output."""


def main(package: str, prepare: Callable[[Request], Prepared]) -> None:
    """Run one request from the command line. prepare: everything before the clock starts (loading)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--no-save", action="store_true", help="only time it")
    args = parser.parse_args()
    options = dict(option.split("=", 1) for option in args.option)
    ids = torch.from_numpy(np.load(args.ids))
    request = Request(args.model.resolve(), args.out.resolve(), ids, args.bits, args.group, options)
    quantize = prepare(request)
    began, cpu = time.perf_counter(), time.process_time()
    decode = quantize()
    report = {
        "package": f"{package} {version(package)}",
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": peak_mb(),
    }
    if decode is not None and not args.no_save:
        save(request.model, request.out, decode())
    print(json.dumps(report))


def peak_mb() -> float:
    """The most that this process had in memory (Linux).

    Not `ru_maxrss`, which begins with what the parent had when it started this process.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def save(source: Path, out: Path, changed: Mapping[str, Tensor]) -> None:
    """The source's folder with some parameters replaced, everything in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    if not changed or changed.keys() - parameters.keys():
        raise SystemExit(f"nothing was quantized, or under other names: {sorted(changed)[:4]}")
    tensors = {name: changed.get(name, p).detach().float().contiguous() for name, p in parameters.items()}
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    for file in source.iterdir():
        if file.suffix in {".json", ".model"} and file.name != "config.json" and ".index." not in file.name:
            shutil.copyfile(file, out / file.name)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """What everybody quantizes: the linear layers, without the one that gives the predictions."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The matrices, where a peer leaves the decoded numbers in the layers themselves."""
    return {f"{name}.weight": module.weight for name, module in linears(model).items()}
