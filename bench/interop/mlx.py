"""MLX and mlx-lm, on a processor: run in an environment with mlx[cpu] and mlx-lm. See `harness` for how.

Weights are what `mx.dequantize` makes of them with scales and offsets widened to float32. MLX multiplies in another
order than torch, so logits differ in their last digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm import convert
from mlx_lm.utils import load_model

from interop.harness import LOGITS, TOKENS, Numbers, Tool

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
SETTINGS: dict[str, dict[str, Any]] = {
    "mlx-4-g64": {"q_bits": 4, "q_group_size": 64},
    "mlx-4-g32-float32": {"q_bits": 4, "q_group_size": 32, "dtype": "float32"},
    "mlx-8-g32": {"q_bits": 8, "q_group_size": 32},
    "mlx-3-g128": {"q_bits": 3, "q_group_size": 128},
    "mlx-2-g32": {"q_bits": 2, "q_group_size": 32},
}


def write(model: Path, out: Path, setting: Mapping[str, Any]) -> None:
    convert(str(model), str(out), quantize=True, **setting)


def run(folder: Path) -> Numbers:
    model = load_model(folder)[0]
    model.set_dtype(mx.float32)
    found = {name: np.array(array) for name, array in weights(model).items()}
    found[LOGITS] = np.array(model(mx.array([list(TOKENS)]))[0])
    return found


def weights(model: Any) -> dict[str, Any]:
    """Every parameter in float32, by name; what a layer is packed into besides is left out."""
    arrays = dict(tree_flatten(model.parameters()))
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZED):
            packed = [arrays.pop(f"{name}.{part}") for part in ("weight", "scales", "biases")]
            arrays[f"{name}.weight"] = mx.dequantize(*packed, group_size=module.group_size, bits=module.bits)
    return {name: array.astype(mx.float32) for name, array in arrays.items()}


if __name__ == "__main__":
    Tool(("mlx", "mlx-lm"), SETTINGS, write, run).main()
