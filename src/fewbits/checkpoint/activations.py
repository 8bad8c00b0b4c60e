"""Activations in a checkpoint: which entries say what inputs and the key-value cache are rounded to.

A linear layer's weight says it by `Entry.inputs`. A static scale is an entry of its own, float32 [1], named as
compressed-tensors and vLLM name it, and marked with the format that it is the scale of:

    M.input_scale             of the inputs of the linear layer whose weight is M.weight
    A.k_scale, A.v_scale      of the keys (after rotary embedding, as the cache stores them) and values of attention A

So scales are declared, written, hashed and read back like every other tensor. All layers of a model share one format
for their cache. vLLM runs FP8 caches only; INT8 ones are read by transformers, and by fewbits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from fewbits.checkpoint.base import Entry
from fewbits.errors import UnsupportedError
from fewbits.formats import ActivationFormat, Float

WEIGHT = ".weight"
INPUT_SCALE = ".input_scale"
CACHE_SCALES = (".k_scale", ".v_scale")
EXPERT = re.compile(r"\.experts\.\d+\.")
EMBEDDING = re.compile(r"(^|\.)(wte|wpe|[^.]*embed(?!_out)[^.]*)\.weight$")
FP32 = Float(torch.float32)


def input_scale(weight: Entry) -> Entry | None:
    """The entry of a weight's static input scale; None where its inputs have none."""
    if weight.inputs is None or not weight.inputs.static or is_scale(weight):
        return None
    return Entry(weight.name.removesuffix(WEIGHT) + INPUT_SCALE, (1,), FP32, weight.inputs)


def cache_scales(attention: str, format: ActivationFormat) -> tuple[Entry, Entry]:
    """The entries of the scales of an attention's keys and values, in a static format."""
    keys, values = (Entry(attention + suffix, (1,), FP32, format) for suffix in CACHE_SCALES)
    return keys, values


def is_scale(entry: Entry) -> bool:
    """Whether an entry is a static scale, and no parameter of the model."""
    return entry.inputs is not None and isinstance(entry.format, Float)


def cache_format(entries: Mapping[str, Entry]) -> ActivationFormat | None:
    """What keys and values are rounded to; None if they are not."""
    return next((e.inputs for e in entries.values() if is_scale(e) and e.name.endswith(CACHE_SCALES)), None)


def activation_trouble(entry: Entry) -> str | None:
    """Why no checkpoint can say this of an entry's inputs, if none can."""
    if entry.inputs is None:
        return None
    if is_scale(entry):
        return _scale_trouble(entry)
    trouble = entry.inputs.weight_trouble(entry.format)
    if trouble:
        return trouble
    if len(entry.shape) != 2 or not entry.name.endswith(WEIGHT) or EMBEDDING.search(entry.name):
        return f"{entry.inputs} inputs belong to linear layers, whose weight is a matrix named '….weight'"
    if EXPERT.search(entry.name):
        return (
            f"{entry.inputs} inputs of experts: the running model fuses experts into one step that cannot round what "
            "they read; quantize the weights of experts alone"
        )
    return None


def _scale_trouble(entry: Entry) -> str | None:
    named = entry.name.endswith((INPUT_SCALE, *CACHE_SCALES))
    if not named or entry.inputs is None or not entry.inputs.static:
        return (
            f"{entry.format} with {entry.inputs} inputs: rounded inputs need rounded weights, and a static scale is "
            f"named …{INPUT_SCALE}, …{' or …'.join(CACHE_SCALES)}"
        )
    return None if (entry.shape, entry.format) == ((1,), FP32) else "a static scale is float32 [1]"


def require_scales(entries: Sequence[Entry]) -> None:
    """Raise UnsupportedError unless static scales and what they are scales of are declared together."""
    by_name = {entry.name: entry for entry in entries}
    needed = {scale for entry in entries if (scale := input_scale(entry)) is not None}
    shared = cache_format(by_name)
    for entry in entries:
        for suffix in CACHE_SCALES:
            if shared and is_scale(entry) and entry.name.endswith(suffix):
                needed |= set(cache_scales(entry.name.removesuffix(suffix), shared))
    declared = {entry for entry in entries if is_scale(entry)}
    for entry in sorted(needed ^ declared, key=lambda scale: scale.name):
        what = f"is missing ({entry.inputs})" if entry in needed else f"({entry.inputs}) belongs to nothing"
        raise UnsupportedError(f"the static scale {entry.name} {what}; declare scales with what they are scales of")
