"""What an ONNX file says of its weights, read back by the operators' definitions and by onnx_ir's own unpacking.

    DequantizeLinear, MatMulInteger    (codes − zero) · scale; a scale for all, for each column of [K, N], or each block
                                       of rows (ONNX operators, opset 21)
    MatMulNBits                        (codes − zero) · scale by blocks of a row (onnxruntime's ContribOperators.md)

Every one must be the weight of the checkpoint, bit for bit. One matrix is decoded at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fewbits.engine.weights import Weight
from fewbits.export.blocks import CONTRIB
from fewbits.export.express import SIXTEEN, numbers_of

Array: TypeAlias = NDArray[Any]
Progress = Callable[[int, int, str], None]


def wrong_weights(
    path: Path, quantized: Mapping[str, Weight], kept: Mapping[str, Weight], progress: Progress | None = None
) -> list[str]:
    """A sentence for every weight of an ONNX file that is not the checkpoint's. onnx.checker has its say first."""
    import onnx
    import onnx_ir as ir

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker's and shape inference's own kinds
        return [f"{path.name}: onnx.checker refuses it: {error}"]
    graph = ir.load(path).graph
    wrong = []
    for done, (name, weight) in enumerate(quantized.items()):
        if progress is not None:
            progress(done, len(quantized), "reading back")
        wrong += [f"{name}: {trouble}" for trouble in _trouble(graph, name, weight)]
    return wrong + [
        f"{name}: {trouble}" for name, weight in kept.items() for trouble in _kept_trouble(graph, name, weight)
    ]


def _trouble(graph: Any, name: str, weight: Weight) -> Iterator[str]:
    if f"{name}.codes" not in graph.initializers:
        yield "is not in the file"
        return
    found = torch.from_numpy(_decoded(graph, name, weight.entry.shape))
    if not torch.equal(found, weight.numbers(torch.float32, torch.device("cpu"))):
        yield "decodes to other numbers than the checkpoint's"


def _kept_trouble(graph: Any, name: str, weight: Weight) -> Iterator[str]:
    """Of a tensor in floating point; what no output depends on (BERT's pooler) is not in the file."""
    if name in graph.initializers:
        stored = graph.initializers[name].const_value
        dtype = next((dtype for dtype, known in SIXTEEN.items() if known == stored.dtype.name), torch.float32)
        if not np.array_equal(stored.numpy(), numbers_of(weight, dtype)):
            yield "has other numbers than the checkpoint's"


def _decoded(graph: Any, name: str, shape: tuple[int, ...]) -> Array:
    """A weight [N, K], float32, by the definition of the operator that reads its codes."""
    codes = graph.initializers[f"{name}.codes"]
    scale = graph.initializers[f"{name}.scale"].const_value.numpy()
    stored = graph.initializers.get(f"{name}.zero")
    zero = None if stored is None else stored.const_value.numpy()
    user = next(iter(codes.uses())).node
    if user.domain == CONTRIB:
        return _by_blocks_of_bytes(codes.const_value.numpy(), scale, zero, user, shape)
    wide = codes.const_value.numpy().astype(np.int32)
    if user.op_type == "Gather":
        behind = next(iter(user.outputs[0].uses())).node
        return _dequantized(wide, scale, zero, behind, -1)
    return np.ascontiguousarray(_dequantized(wide, scale, zero, user, 0).T)


def _dequantized(codes: Array, scale: Array, zero: Array | None, node: Any, axis: int) -> Array:
    """DequantizeLinear and what is behind MatMulInteger: blocks along `axis` where scales have two dimensions."""
    if scale.ndim == 2:
        size = node.attributes["block_size"].value
        scale, zero = (_spread(p, size, axis, codes.shape[axis]) for p in (scale, zero))
    centred = codes if zero is None else codes - zero.astype(np.int32)
    return centred.astype(np.float32) * scale


def _spread(param: Array | None, size: int, axis: int, length: int) -> Any:
    return None if param is None else np.repeat(param, size, axis).take(range(length), axis)


def _by_blocks_of_bytes(codes: Array, scale: Array, zero: Array | None, node: Any, shape: tuple[int, ...]) -> Array:
    bits, size = node.attributes["bits"].value, node.attributes["block_size"].value
    unsigned = _unpacked(codes.reshape(shape[0], -1), bits)[:, : shape[1]].astype(np.int32)
    if zero is None:
        zeros = np.full(scale.shape, 1 << (bits - 1), np.int32)
    else:
        zeros = _unpacked(zero, bits)[:, : scale.shape[1]].astype(np.int32)
    scale, zeros = (_spread(p, size, 1, shape[1]) for p in (scale, zeros))
    decoded: Array = (unsigned - zeros).astype(np.float32) * scale
    return decoded


def _unpacked(packed: Array, bits: int) -> Array:
    """Codes of a row side by side, the low half of a byte first."""
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
