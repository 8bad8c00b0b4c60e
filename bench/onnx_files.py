"""ONNX files beside torch: bytes, how far outputs are, and milliseconds per forward.

A model is exported in floating point and in every format asked for, for both sets of operators, and each file is run by
onnxruntime as by default, exact, and with its inputs' 8-bit rounding switched off (`accuracy 1`). torch runs the
original in FP32. All run in turns, round after round, on the same random tokens; figures are medians, ratios are to
torch in the same round.

    python bench/onnx_files.py MODEL --formats int8 int4-g32 --tokens 128 --rounds 9 --threads 2
    python bench/onnx_files.py bert --formats int8 int8+int8-token int4-g32  # random, of base size
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import fewbits

LEVEL = "session.qdq_matmulnbits_accuracy_level"


def random_bert(folder: Path) -> Path:
    """BERT's base size with random weights and a classifier of two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig()).save_pretrained(folder)
    return folder


def session(path: Path, how: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if how == "exact":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if how == "accuracy 1":
        options.add_session_config_entry(LEVEL, "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def exported(model: Path, format: str, way: Any, out: Path) -> Path:
    """FORMAT or FORMAT+INPUTS; `float` is the model as it is."""
    weights, _, inputs = format.partition("+")
    fewbits.export_onnx(model, out, format=None if weights == "float" else weights, inputs=inputs or None, way=way)
    return out


def runs(args: argparse.Namespace, model: Path, folder: Path) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name -> bytes of the file, and a forward pass."""
    loaded = fewbits.load(model)
    ids = torch.randint(loaded.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def by_torch() -> Any:
        with torch.inference_mode():
            outputs = loaded(**given)
        return (outputs["logits"] if "logits" in outputs else outputs[0]).numpy()

    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    made: dict[str, tuple[int, Callable[[], Any]]] = {"torch FP32": (size, by_torch)}
    for i, format in enumerate(["float", *args.formats]):
        for way in ("portable", "onnxruntime") if "-g" in format else ("portable",):
            out = exported(model, format, way, folder / f"{i}-{way}.onnx")
            nbytes = sum(file.stat().st_size for file in folder.glob(f"{out.name}*"))
            for how in ("default", "accuracy 1", "exact"):
                made[f"{format}, {way}, {how}"] = nbytes, _forward(session(out, how, args.threads), given)
    return made


def _forward(made: onnxruntime.InferenceSession, given: dict[str, torch.Tensor]) -> Callable[[], Any]:
    zeros = torch.zeros_like(given["input_ids"])
    inputs = {each.name: given.get(each.name, zeros).numpy() for each in made.get_inputs()}
    return lambda: made.run(None, inputs)[0]


def measured(made: dict[str, tuple[int, Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    reference = made["torch FP32"][1]()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, (_, forward) in made.items():
            began = time.perf_counter()
            forward()
            seconds[name].append(time.perf_counter() - began)
    found = {}
    for name, (nbytes, forward) in made.items():
        output = forward()
        ratios = [b / a for a, b in zip(seconds[name], seconds["torch FP32"], strict=True)]
        found[name] = {
            "bytes": nbytes,
            "difference": float(np.linalg.norm(output - reference) / np.linalg.norm(reference)),
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "times_torch": statistics.median(ratios),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or `bert` for a random one of base size")
    parser.add_argument("--formats", nargs="+", default=["int8", "int8+int8-token", "int4-g32"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = random_bert(Path(folder) / "bert") if args.model == "bert" else Path(args.model)
        found = measured(runs(args, model, Path(folder)), args.rounds)
    print(f"{'':42}{'MB':>9}{'difference':>13}{'ms':>9}{'times torch':>13}")
    for name, line in found.items():
        figures = f"{line['bytes'] / 1e6:9.1f}{line['difference']:13.1e}{line['milliseconds']:9.1f}"
        print(f"{name:42}{figures}{line['times_torch']:13.2f}")
    print(json.dumps({"tokens": args.tokens, "rounds": args.rounds, "threads": args.threads, "results": found}))


if __name__ == "__main__":
    main()
