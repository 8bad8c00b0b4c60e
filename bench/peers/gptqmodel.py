"""GPTQModel: GPTQ with activation order inside groups (its default, `act_group_aware`).

Options: `desc_act` full activation order instead; `static_groups` fixes the scales beforehand; `mse` > 0 searches
scales by that power of the error; `damp_percent`. The result is saved and loaded again before it is decoded, because
the layers that quantizing leaves in memory hold zero-points in the file's convention, which is lower by one than what
their own decoder expects. GPTQMODEL_CPU_WORKERS sets its threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import QuantizeConfig
from torch import Tensor

from peers.harness import Decode, Prepared, Request, main

NUMBERS = ("mse", "damp_percent")
FLAGS = ("desc_act", "static_groups", "act_group_aware")


def prepare(request: Request) -> Prepared:
    given = {name: float(request.options[name]) for name in NUMBERS if name in request.options}
    given |= {name: request.flag(name, False) for name in FLAGS if name in request.options}
    config = QuantizeConfig(
        bits=request.bits,
        group_size=request.group,
        sym=request.flag("symmetric", True),
        offload_to_disk=False,
        **given,
    )
    model = GPTQModel.load(str(request.model), config, device="cpu", dtype=torch.float32)
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in request.ids]

    def quantize() -> Decode:
        model.quantize(data, batch_size=1)
        return lambda: decoded(model)

    return quantize


def decoded(made: Any) -> Mapping[str, Tensor]:
    """A packed layer's weight is [in_features, out_features]."""
    with tempfile.TemporaryDirectory() as folder:
        made.save(folder)
        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
        packed = {name: m for name, m in model.named_modules() if hasattr(m, "dequantize_weight")}
        for module in packed.values():
            module.scales = module.scales.float()  # so that products are not rounded to 16 bits
        return {f"{name}.weight": module.dequantize_weight().T for name, module in packed.items()}


if __name__ == "__main__":
    main("gptqmodel", prepare)
