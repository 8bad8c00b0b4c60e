"""llama.cpp, through llama-cpp-python: GGUF. See `harness` for how this is run; MODEL is a GGUF file in floating point.

    fewbits quantize MODEL MODEL.gguf --format fp32

llama.cpp multiplies quantized weights by inputs rounded to 8 bits and keeps keys and values in 16. So that weights are
compared with weights, it decodes the file first, into one in float32 (`llama-quantize --allow-requantize`): those are
the weights, and logits are what it computes with them, keys and values in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from numpy.typing import NDArray

from interop.harness import LOGITS, TOKENS, Numbers, Tool

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS")
SETTINGS: dict[str, dict[str, Any]] = {name: {"type": f"MOSTLY_{name}"} for name in (*NAMES, "TQ1_0", "TQ2_0", "BF16")}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{setting['type']}")
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(model).encode(), str(out).encode(), params):
        raise RuntimeError("llama_model_quantize failed, and says why above")


def run(file: Path) -> Numbers:
    with TemporaryDirectory() as folder:
        decoded = Path(folder) / "decoded.gguf"
        write(file, decoded, {"type": "ALL_F32"})
        tensors = GGUFReader(decoded).tensors
        other = [tensor.name for tensor in tensors if tensor.tensor_type != GGMLQuantizationType.F32]
        if other:
            raise RuntimeError(f"not decoded: {', '.join(other)}")
        # A copy, since the reader maps the file; its shapes are llama.cpp's, columns first.
        found: Numbers = {t.name: np.array(t.data).reshape(t.shape[::-1]) for t in tensors}
        found[LOGITS] = logits(decoded)
    return found


def logits(file: Path) -> NDArray[np.float32]:
    exact = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(file), n_ctx=128, n_threads=2, logits_all=True, type_k=exact, type_v=exact, verbose=False
    )
    model.eval(list(TOKENS))
    return np.array(model.scores[: len(TOKENS)])


if __name__ == "__main__":
    Tool(("llama-cpp-python", "gguf"), SETTINGS, write, run, ending=".gguf").main()
