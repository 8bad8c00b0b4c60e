"""torchao: weight-only integers, rounded to nearest at scales from the range; no data.

Options: `algorithm` affine or hqq_scale_only, how scales are chosen.
"""

from __future__ import annotations

import torch
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from peers.harness import Decode, Prepared, Request, linears, main


def prepare(request: Request) -> Prepared:
    model = request.load()
    layers = set(linears(model).values())
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{request.bits}"),
        granularity=PerGroup(request.group),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(request.options.get("algorithm", "affine")),
    )

    def quantize() -> Decode:
        quantize_(model, config, filter_fn=lambda module, _: module in layers)
        return lambda: {f"{name}.weight": layer.weight.dequantize() for name, layer in linears(model).items()}

    return quantize


if __name__ == "__main__":
    main("torchao", prepare)
