"""llm-compressor: GPTQ with static activation order (its default), or AWQ followed by rounding to nearest.

Options: `method` gptq or awq; `observer` minmax or mse, how scales are chosen; `actorder` static, group or none. Its
weights are left in the layers as decoded numbers.
"""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier

from peers.harness import Decode, Prepared, Request, main, weights_of


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
        return lambda: weights_of(model)

    return quantize


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
        return [AWQModifier(), QuantizationModifier(**scheme)]
    order = request.options.get("actorder", "static")
    return [GPTQModifier(**scheme, actorder=None if order == "none" else order)]


if __name__ == "__main__":
    main("llmcompressor", prepare)
