"""llm-compressor: GPTQ with static activation order (its default), or AWQ followed by rounding to nearest.

Options: `method` gptq or awq; `observer` memoryless_minmax or memoryless_mse, how scales are chosen; `actorder` static,
group or none. GPTQ leaves decoded numbers in the layers; after AWQ a layer rounds its numbers whenever it is used. Its
AWQ pins memory, which fails where there is no accelerator to pin it for, so that step is left out there.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, forward_quantize
from compressed_tensors.utils import getattr_chain
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor, nn

from peers.harness import Decode, Prepared, Request, linears, main


def prepare(request: Request) -> Prepared:
    model = request.load()
    rows = request.ids.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})

    def quantize() -> Decode:
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe(request),
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
            shuffle_calibration_samples=False,
        )
        return lambda: decoded(model) | norms_of(model)

    return quantize


@torch.no_grad()
def decoded(model: nn.Module) -> dict[str, Tensor]:
    """Every matrix as its layer rounds it, which changes nothing after GPTQ."""
    schemes = {name: getattr_chain(layer, "quantization_scheme.weights") for name, layer in linears(model).items()}
    return {
        f"{name}.weight": forward_quantize(layer, layer.weight, "weight", schemes[name])
        for name, layer in linears(model).items()
    }


def norms_of(model: nn.Module) -> dict[str, Tensor]:
    """What AWQ divides by its factors."""
    return {name: p for name, p in model.named_parameters() if name.endswith("norm.weight")}


def recipe(request: Request) -> list[Any]:
    weights = QuantizationArgs(
        num_bits=request.bits,
        group_size=request.group,
        strategy="group",
        symmetric=request.flag("symmetric", True),
        observer=request.options.get("observer", "memoryless_minmax"),
    )
    scheme = {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
    if request.options.get("method", "gptq") == "awq":
        if not torch.accelerator.is_available():
            IntermediatesCache.pin_memory = lambda *_: None
        return [AWQModifier(), QuantizationModifier(**scheme)]
    order = request.options.get("actorder", "static")
    return [GPTQModifier(**scheme, actorder=None if order == "none" else order)]


if __name__ == "__main__":
    main("llmcompressor", prepare)
