"""hqq: half-quadratic search of zero-points, no data. Asymmetric; zero-points and scales stay floating point."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from peers.harness import Decode, Prepared, Request, linears, main


def prepare(request: Request) -> Prepared:
    model = request.load()
    config = BaseQuantizeConfig(nbits=request.bits, group_size=request.group, axis=1)

    def quantize() -> Decode:
        made = {
            name: HQQLinear(linear, quant_config=config, compute_dtype=torch.float32, device="cpu")
            for name, linear in linears(model).items()
        }
        return lambda: {f"{name}.weight": layer.dequantize() for name, layer in made.items()}

    return quantize


if __name__ == "__main__":
    main("hqq", prepare)
