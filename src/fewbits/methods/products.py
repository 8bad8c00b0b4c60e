"""In which type matrices are multiplied while something is trained.

Gradients that only need a sign, or are averages over thousands of tokens, are as good from BF16 products as from FP32
ones where the numbers in them are a few bits wide, and processors with BF16 units are two to four times faster at them.
Sums, norms and losses stay in float32, as under autocast everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from fewbits.formats import Format

FINEST = 32
"""With more levels than this, BF16's own rounding of a weight is not small against the format's."""


def product_type(formats: Iterable[Format], device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware and all the formats are coarse; else float32."""
    coarse = all(format.levels is not None and len(format.levels) <= FINEST for format in formats)
    return torch.bfloat16 if coarse and multiplies_bf16(device) else torch.float32


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Multiply matrices in that type, within."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has units for it."""
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
