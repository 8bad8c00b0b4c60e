"""What fits where: the bytes of a model's weights at every format, with its KV cache.

Weights are counted exactly, codes alone (7 billion weights are 7 GB at 8 bits and 3.5 GB at 4); the scales come on top
and are counted apart, as they fall on a 4096 × 4096 matrix. The KV cache holds a key and a value of head_dim numbers
for each layer, KV head and token of context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fewbits.errors import FewbitsError
from fewbits.formats import FORMATS, Format
from fewbits.formats.explain import bits_per_weight, code_bits, family

MACHINES = (8, 16, 24, 32, 64, 80)  # GB
USABLE = 0.9  # the rest is left to activations and to the system
USUAL_GROUP = 128


@dataclass(frozen=True)
class Shape:
    """What a model's KV cache depends on, and whose shape it is."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int

    def numbers(self, context: int) -> int:
        """Keys and values kept after `context` tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context


# Published configurations (config.json of each model): weights -> shape.
PUBLISHED: Mapping[float, Shape] = {
    0.135e9: Shape("SmolLM2-135M", 30, 3, 64),
    0.494e9: Shape("Qwen2.5-0.5B", 24, 2, 64),
    1.24e9: Shape("Llama-3.2-1B", 16, 8, 64),
    3.21e9: Shape("Llama-3.2-3B", 28, 8, 128),
    7.25e9: Shape("Mistral-7B", 32, 8, 128),
    14.8e9: Shape("Qwen2.5-14B", 48, 8, 128),
    32.8e9: Shape("Qwen2.5-32B", 64, 8, 128),
    70.6e9: Shape("Llama-3.1-70B", 80, 8, 128),
    405.9e9: Shape("Llama-3.1-405B", 126, 8, 128),
}


@dataclass(frozen=True)
class Row:
    """One format's bytes. total has weights, scales and the KV cache in FP16; fits are the MACHINES that hold it."""

    format: str
    bits_per_weight: float
    weights: int
    scales: int
    total: int
    total_int8_kv: int
    fits: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """What a model needs at each format. Bytes; kv_* are the cache of `context` tokens of `batch` sequences."""

    model: str
    parameters: int
    architecture: str
    context: int
    batch: int
    kv_fp16: int
    kv_int8: int
    rows: tuple[Row, ...]


def memory(
    parameters: int,
    cached: int,
    *,
    model: str,
    architecture: str,
    context: int,
    batch: int = 1,
    formats: Iterable[Format] | None = None,
) -> Memory:
    """The table of a model with so many parameters, whose cache holds `cached` numbers after `context` tokens.

    formats default to `usual_formats()`.
    """
    kv16, kv8 = 2 * cached * batch, cached * batch
    chosen = usual_formats() if formats is None else formats
    return Memory(
        model=model,
        parameters=parameters,
        architecture=architecture,
        context=context,
        batch=batch,
        kv_fp16=kv16,
        kv_int8=kv8,
        rows=tuple(_row(format, parameters, kv16, kv8) for format in chosen),
    )


def usual_formats() -> list[Format]:
    """One format of each family: the first one at 8 bits and above and where all have groups, else the group of 128."""
    families: dict[str, list[Format]] = {}
    for format in FORMATS.values():
        families.setdefault(family(format), []).append(format)
    return [_representative(variants) for variants in families.values()]


def nearest_published(parameters: int) -> Shape:
    """The published architecture whose size is nearest, as a ratio."""
    nearest = min(PUBLISHED, key=lambda size: abs(math.log(size / parameters)))
    return PUBLISHED[nearest]


def parameter_count(text: str) -> int | None:
    """7B, 1.5b, 350M, 405 as a count of parameters (a bare number is taken as it is); None if it is no size."""
    factors = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    digits, factor = (text[:-1], factors[text[-1:].upper()]) if text[-1:].upper() in factors else (text, 1.0)
    try:
        value = float(digits) * factor
    except ValueError:
        return None
    if not (math.isfinite(value) and value >= 1):
        raise FewbitsError(f"a model of {text} parameters: the count must be at least 1, such as 7B or 350M")
    return round(value)


def _representative(variants: list[Format]) -> Format:
    if code_bits(variants[0]) >= 8 or isinstance(getattr(variants[0], "group", None), int):
        return variants[0]
    return next((v for v in variants if getattr(v, "group", None) == USUAL_GROUP), variants[0])


def _row(format: Format, parameters: int, kv16: int, kv8: int) -> Row:
    bits = bits_per_weight(format)
    weights = round(parameters * code_bits(format) / 8)
    scales = round(parameters * bits / 8) - weights
    total = weights + scales + kv16
    fits = tuple(size for size in MACHINES if total <= USABLE * size * 1e9)
    return Row(format.name, bits, weights, scales, total, total - kv16 + kv8, fits)
