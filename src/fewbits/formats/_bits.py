"""Codes into dense little-endian bit streams, and back.

The stream of a row is the one that compressed-tensors, GPTQ and MLX share: code i occupies bits [i*b, (i+1)*b), lowest
bit first, rows padded with zero bits to whole 32-bit words.
Widths that divide 8 take a fast path that folds a machine word of codes by shifts; the others go through 64-bit words
of eight codes each (8 codes of b bits are b bytes).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 32  # bits; rows are padded to whole words


def words(in_features: int, bits: int) -> int:
    """32-bit words in a row of in_features codes."""
    return -(-in_features * bits // WORD)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes, uint8 [..., K] below 2**bits, to int32 [..., words(K, bits)]."""
    n = words(codes.shape[-1], bits)
    padded = -codes.shape[-1] % WORD
    codes = pad(codes, (0, padded)) if padded else codes.contiguous()
    stream = _fold(codes, bits) if bits in (1, 2, 4) else codes if bits == 8 else _pack_by_eights(codes, bits)
    return stream.view(torch.int32)[..., :n].contiguous()


def unpack_bits(stream: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of pack_bits: uint8 codes [..., in_features]."""
    data = stream.contiguous().view(torch.uint8)
    if bits in (1, 2, 4):
        return _unfold(data, bits).flatten(-2)[..., :in_features].contiguous()
    octets = -(-in_features // 8) * bits  # bytes that hold whole eights of codes
    data = pad(data, (0, max(0, octets - data.shape[-1])))[..., :octets]
    eights = pad(data.reshape(*data.shape[:-1], -1, bits), (0, 8 - bits)).contiguous().view(torch.int64)
    shifts = torch.arange(0, 8 * bits, bits, device=stream.device)
    codes = ((eights >> shifts) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :in_features].contiguous()


def _fold(codes: Tensor, bits: int) -> Tensor:
    """bits in {1, 2, 4}: halve the bytes until none is wasted, two neighbours into one byte each time."""
    while bits < 8:
        pairs = codes.view(torch.int16)  # low byte: the even code; high byte: the odd one
        codes = (pairs | (pairs >> (8 - bits))).to(torch.uint8)
        bits *= 2
    return codes


def _unfold(data: Tensor, bits: int) -> Tensor:
    """bits in {1, 2, 4}: the codes of each byte, [..., bytes, 8 / bits]."""
    codes = torch.empty((*data.shape, 8 // bits), dtype=torch.uint8, device=data.device)
    for i in range(8 // bits):
        torch.bitwise_right_shift(data, i * bits, out=codes[..., i])
    return codes.bitwise_and_((1 << bits) - 1)


def _pack_by_eights(codes: Tensor, bits: int) -> Tensor:
    eights = codes.reshape(*codes.shape[:-1], -1, 8).to(torch.int64)
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    folded: Tensor = (eights << shifts).sum(-1, keepdim=True)
    return folded.view(torch.uint8)[..., :bits].flatten(-2).contiguous()


def pack_trits(codes: Tensor) -> Tensor:
    """Codes 0..2, uint8 [..., K], five to a byte in base 3 (3**5 = 243 <= 256): uint8 [..., ceil(K / 5)]."""
    fives: Tensor = pad(codes, (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5))
    place = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=codes.device)
    return (fives * place).sum(-1, dtype=torch.uint8)


def unpack_trits(data: Tensor, in_features: int) -> Tensor:
    """The inverse of pack_trits: uint8 codes [..., in_features]."""
    place = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=data.device)
    codes = data.unsqueeze(-1).div(place, rounding_mode="floor") % 3
    return codes.flatten(-2)[..., :in_features].contiguous()
