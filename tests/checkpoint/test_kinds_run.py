"""A model runs on every kind of folder as on any other that holds the same numbers, and the folder is proven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model

import fewbits
from fewbits.checkpoint import KINDS

IDS = torch.arange(2, 66).view(1, 64)
FORMATS = {
    "bitsandbytes": "nf4",
    "mlx": "mlx4-g64",
    "gptq": "int4-g32",
    "gptq-v2": "int4-asym-g32",
    "awq": "int4-asym-g64",
    "compressed-tensors": "int4-g32",
}
OTHERS = {"fewbits", "huggingface", "bitnet", "gguf", "fp8"}
"""What the others are compared with, what keeps all numbers, and what is held to its own tool in its own test: BitNet's
layers round their inputs, GGUF's vocabulary has a format of its own, FP8 keeps matrices of less than whole blocks.
"""


def test_no_kind_is_left_out() -> None:
    written = {kind.name for kind in KINDS.values() if kind.written}
    assert written - FORMATS.keys() == OTHERS


@pytest.mark.parametrize("kind", FORMATS)
def test_it_runs_and_is_verified(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path / "source", "llama", hidden_size=64, intermediate_size=128)
    for name, chosen in ("out", kind), ("own", "fewbits"):
        fewbits.quantize(tmp_path / "source", tmp_path / name, format=FORMATS[kind], kind=chosen)
    with torch.inference_mode():
        ours, same_bits = (fewbits.load(tmp_path / name)(IDS).logits for name in ("out", "own"))
    assert torch.equal(ours, same_bits)
    assert fewbits.verify(tmp_path / "out", tmp_path / "source").passed
