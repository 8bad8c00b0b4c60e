"""decode: some rows of a packed matrix as numbers, written where they are wanted.

    decoder(weight [N, K] packed) -> rows, out [R, K] -> None

rows is a slice or int64 [R]; out is contiguous, of any floating-point dtype, on the device of the weight. float32
receives `QTensor.dequantize()` to the bit, every other dtype what `.to(dtype)` makes of that. What belongs to the whole
matrix (scales that are themselves quantized) is decoded once, when the decoder is made.

The compiled kernel (csrc/decode.cpp) is for formats that say how to look their codes up (`Format.lookup`): integers,
NF4, FP4, FP8, binary. It writes float32 and bfloat16, rounded to the nearest and ties to even, in a third of a
nanosecond a weight on one core, where the reference takes 0.8 to 2.9. Other dtypes pass through a block of float32.
Everything else goes through the reference: formats whose bytes are of another kind, other devices, installations
without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fewbits.formats import Lookup, QTensor
from fewbits.kernels._compiled import compiled

if TYPE_CHECKING:
    from fewbits.kernels.packed import Packed

Decoder: TypeAlias = Callable[[slice | Tensor, Tensor], None]

BLOCK = 1 << 18
"""Weights decoded at a time: 1 MB of float32, which stays in a core's cache until it is read again."""


def decoder(weight: Packed) -> Decoder:
    """What decodes rows of this matrix. See the module for its arguments."""
    core = compiled() if all(array.device.type == "cpu" for array in weight.arrays.values()) else None
    lookup = None if core is None else weight.format.lookup(weight.arrays, (weight.shape[0], weight.shape[1]))
    return reference(weight) if lookup is None else _looking_up(core, lookup)


def reference(weight: Packed) -> Decoder:
    """Decoding by the format's own `unpack` and `decode`, a block at a time; a matrix that is not rowwise is unpacked
    as a whole, to a byte a weight, and stays so as long as its decoder.
    """
    take = weight.take if weight.format.rowwise else partial(taken, weight.unpack())

    def decode(rows: slice | Tensor, out: Tensor) -> None:
        for part, block in _blocks(rows, out):
            block.copy_(take(part).dequantize())

    return decode


def taken(weight: QTensor, rows: slice | Tensor) -> QTensor:
    """Rows of an unpacked matrix: a param has a row for each of them, or is shared by all."""
    n = weight.shape[0]
    params = {key: p[rows] if p.dim() > 1 and p.shape[0] == n else p for key, p in weight.params.items()}
    return QTensor(weight.format, weight.codes[rows], params)


def _looking_up(core: Any, lookup: Lookup) -> Decoder:
    def decode(rows: slice | Tensor, out: Tensor) -> None:
        if out.dtype in (torch.float32, torch.bfloat16):
            _look_up(core, lookup.take(rows), out)
            return
        for part, block in _blocks(rows, out):
            numbers = torch.empty(block.shape)
            _look_up(core, lookup.take(part), numbers)
            block.copy_(numbers)

    return decode


def _look_up(core: Any, lookup: Lookup, out: Tensor) -> None:
    zero = None if lookup.zero is None else lookup.zero.contiguous()
    codes, scale = lookup.codes.contiguous(), lookup.scale.contiguous()
    operands = codes, lookup.bits, lookup.levels, scale, zero, lookup.group
    if out.dtype == torch.float32:
        core.decode_float32(*operands, out, torch.get_num_threads())
    else:
        core.decode_bfloat16(*operands, out.view(torch.uint16), torch.get_num_threads())


def _blocks(rows: slice | Tensor, out: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Rows and where they go, BLOCK weights at a time."""
    height = max(1, BLOCK // out.shape[1])
    for start in range(0, len(out), height):
        block = out[start : start + height]
        if isinstance(rows, slice):
            yield slice(rows.start + start, rows.start + start + len(block)), block
        else:
            yield rows[start : start + height], block
