"""How compressed-tensors lays out one weight: a class for each of its compressors.

Array names are local to the module (`weight_packed`, `weight_scale` …). See `compressed_tensors` for the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fewbits.errors import CheckpointError
from fewbits.formats import ACTIVATIONS, ActivationFormat, Affine, ArraySpec, Format, Grouped, QTensor
from fewbits.formats._bits import pack_bits, unpack_bits, words
from fewbits.formats.minifloat import Fp8, MxFp4, NvFp4

Read: TypeAlias = Callable[[str, slice | None], Tensor]
LOCALS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
SCALES = (torch.float32, torch.float16, torch.bfloat16)
STRATEGIES = {"row": "channel", "tensor": "tensor"}
TYPES = {"int8": "int", "fp8": "float"}
DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
"""What the library takes the arguments of activations to be where the configuration leaves them out."""
BLOCK = 32  # rows whose zero-points fill whole words at any width


@dataclass(frozen=True)
class Layout(ABC):
    """One weight of a format, in one of the library's layouts."""

    format: Any
    compression: ClassVar[str]

    @property
    def zeros_span_rows(self) -> bool:
        """Whether zero-points are packed along the rows, so that they can only be written with the last row."""
        return False

    @abstractmethod
    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        """Arrays of a weight [N, K]."""

    @abstractmethod
    def encode(self, part: QTensor) -> dict[str, Tensor]:
        """The arrays' rows for these rows of the weight."""

    def closing(self, shape: tuple[int, ...], zeros: list[Tensor]) -> dict[str, Tensor]:
        """Arrays that are written whole with the last row, from the zero-points of all rows."""
        return {}

    @abstractmethod
    def decode(self, read: Read, shape: tuple[int, ...], rows: range) -> QTensor:
        """Rows of a weight; `read` gives rows of an array."""

    def shape(self, where: str, read: Callable[[str], Tensor]) -> tuple[int, ...]:
        """Shape of the weight, from the arrays that are there. Raises CheckpointError if they make no matrix."""
        return _matrix(where, "weight", read)

    @abstractmethod
    def weights(self) -> dict[str, Any]:
        """The `weights` of its config group."""

    def expert_trouble(self) -> str | None:
        """Why transformers, which fuses experts from packed weights and scales, could not load this as one of them."""
        return None

    def _scale_spec(self, shape: tuple[int, ...], dtype: torch.dtype) -> ArraySpec:
        return ArraySpec(dtype, (1,) if self.format.group == "tensor" else self.format.groups(shape))

    def _stored(self, param: Tensor) -> Tensor:
        return param.reshape(1) if self.format.group == "tensor" else param

    def _param(self, read: Read, name: str, shape: tuple[int, ...], rows: range) -> Tensor:
        """A param's rows, in the shape our format gives it."""
        part = None if self.format.group == "tensor" else _slice(rows)
        return read(name, part).reshape(self.format.groups((len(rows), shape[1])))

    def _arguments(self, bits: int, kind: str, *, symmetric: bool = True, **more: Any) -> dict[str, Any]:
        group = self.format.group
        return {
            "num_bits": bits,
            "type": kind,
            "symmetric": symmetric,
            "strategy": STRATEGIES.get(group, "group"),
            "group_size": group if isinstance(group, int) else None,
            "block_structure": None,
            "dynamic": False,
            "actorder": None,
            "observer": None,
            "observer_kwargs": {},
            **more,
        }


@dataclass(frozen=True)
class PackQuantized(Layout):
    """Integers of 1 to 8 bits in a dense stream; the stream is our own."""

    format: Affine
    compression = "pack-quantized"

    @property
    def zeros_span_rows(self) -> bool:
        return not self.format.symmetric and self.format.group != "tensor"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        ours = self.format.arrays(shape)
        specs = {
            "weight_packed": ours["packed"],
            "weight_scale": self._scale_spec(shape, self.format.scale_dtype),
            "weight_shape": ArraySpec(torch.int64, (2,)),
        }
        return specs if self.format.symmetric else specs | {"weight_zero_point": self._zero_spec(shape)}

    def _zero_spec(self, shape: tuple[int, ...]) -> ArraySpec:
        if not self.zeros_span_rows:
            return ArraySpec(torch.int8, (1,))
        return ArraySpec(torch.int32, (words(shape[0], self.format.bits), self.format.groups(shape)[-1]))

    def encode(self, part: QTensor) -> dict[str, Tensor]:
        ours = part.pack()
        arrays = {"weight_packed": ours["packed"], "weight_scale": self._stored(ours["scale"])}
        if self.format.symmetric:
            return arrays
        zero = ours["zero"] if self.zeros_span_rows else _signed(ours["zero"], self.format.bits).reshape(1)
        return arrays | {"weight_zero_point": zero}

    def closing(self, shape: tuple[int, ...], zeros: list[Tensor]) -> dict[str, Tensor]:
        arrays = {"weight_shape": torch.tensor(shape)}
        if zeros:
            arrays["weight_zero_point"] = _turned(pack_bits(_turned(torch.cat(zeros)), self.format.bits))
        return arrays

    def decode(self, read: Read, shape: tuple[int, ...], rows: range) -> QTensor:
        arrays = {
            "packed": read("weight_packed", _slice(rows)),
            "scale": self._param(read, "weight_scale", shape, rows).to(self.format.scale_dtype),
        }
        if not self.format.symmetric:
            arrays["zero"] = self._zeros(read, shape, rows)
        return QTensor.from_arrays(self.format, arrays, (len(rows), shape[1]))

    def _zeros(self, read: Read, shape: tuple[int, ...], rows: range) -> Tensor:
        if not self.zeros_span_rows:
            return _unsigned(read("weight_zero_point", None), self.format.bits).reshape(1, 1)
        first = rows.start // BLOCK
        span = slice(first * self.format.bits, words(rows.stop, self.format.bits))
        stream = _turned(read("weight_zero_point", span))
        skipped = rows.start - first * BLOCK
        zeros = unpack_bits(stream, self.format.bits, skipped + len(rows))
        return _turned(zeros[:, skipped:])

    def shape(self, where: str, read: Callable[[str], Tensor]) -> tuple[int, ...]:
        rows, columns = _matrix(where, "weight_packed", read)
        stored = read("weight_shape")
        if stored.dtype.is_floating_point or stored.shape != (2,) or stored[0] != rows or stored[1] < 1:
            raise CheckpointError(
                f"{where}: weight_shape is {stored.tolist()} beside a packed weight of {[rows, columns]}; "
                "the file is damaged, so download it again"
            )
        return rows, int(stored[1])

    def weights(self) -> dict[str, Any]:
        return self._arguments(self.format.bits, "int", symmetric=self.format.symmetric)

    def expert_trouble(self) -> str | None:
        if self.format.symmetric:
            return None
        return (
            "transformers drops the zero-points of fused experts; choose a symmetric format, or write fewbits instead"
        )


@dataclass(frozen=True)
class IntQuantized(Layout):
    """Integers of up to 8 bits in a byte each."""

    format: Affine
    compression = "int-quantized"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        scale = self._scale_spec(shape, self.format.scale_dtype)
        specs = {"weight": ArraySpec(torch.int8, shape), "weight_scale": scale}
        return specs if self.format.symmetric else specs | {"weight_zero_point": ArraySpec(torch.int8, scale.shape)}

    def encode(self, part: QTensor) -> dict[str, Tensor]:
        scale = self._stored(part.params["scale"].to(self.format.scale_dtype))
        if self.format.symmetric:
            return {"weight": part.codes, "weight_scale": scale}
        zero = self._stored(_signed(part.params["zero"].to(torch.uint8), self.format.bits))
        return {"weight": _signed(part.codes, self.format.bits), "weight_scale": scale, "weight_zero_point": zero}

    def decode(self, read: Read, shape: tuple[int, ...], rows: range) -> QTensor:
        codes = read("weight", _slice(rows))
        scale = self._param(read, "weight_scale", shape, rows).float()
        if self.format.symmetric:
            return QTensor(self.format, codes, {"scale": scale})
        zero = _unsigned(self._param(read, "weight_zero_point", shape, rows), self.format.bits).float()
        return QTensor(self.format, _unsigned(codes, self.format.bits), {"scale": scale, "zero": zero})

    def weights(self) -> dict[str, Any]:
        return self._arguments(self.format.bits, "int", symmetric=self.format.symmetric)

    def expert_trouble(self) -> str:
        return "transformers fuses packed experts only; choose int8 per row, or write fewbits instead"


@dataclass(frozen=True)
class FloatQuantized(Layout):
    """FP8 E4M3 and its scale."""

    format: Fp8
    compression = "float-quantized"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        ours = self.format.arrays(shape)
        return {"weight": ours["weight"], "weight_scale": self._scale_spec(shape, torch.float32)}

    def encode(self, part: QTensor) -> dict[str, Tensor]:
        ours = part.pack()
        return {"weight": ours["weight"], "weight_scale": self._stored(ours["scale"])}

    def decode(self, read: Read, shape: tuple[int, ...], rows: range) -> QTensor:
        arrays = {
            "weight": read("weight", _slice(rows)),
            "scale": self._param(read, "weight_scale", shape, rows).float(),
        }
        return QTensor.from_arrays(self.format, arrays, (len(rows), shape[1]))

    def weights(self) -> dict[str, Any]:
        return self._arguments(8, "float")


@dataclass(frozen=True)
class Mxfp4PackQuantized(Layout):
    """E2M1 nibbles, the first of two in the low half, and scales as we store them."""

    format: MxFp4 | NvFp4
    compression = "mxfp4-pack-quantized"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        ours = self.format.arrays(shape)
        return {"weight_packed": ours["packed"], "weight_scale": ours["scale"]}

    def encode(self, part: QTensor) -> dict[str, Tensor]:
        ours = part.pack()
        return {"weight_packed": ours["packed"], "weight_scale": ours["scale"]}

    def decode(self, read: Read, shape: tuple[int, ...], rows: range) -> QTensor:
        return QTensor.from_arrays(self.format, self._ours(read, rows), (len(rows), shape[1]))

    def _ours(self, read: Read, rows: range) -> dict[str, Tensor]:
        return {"packed": read("weight_packed", _slice(rows)), "scale": read("weight_scale", _slice(rows))}

    def shape(self, where: str, read: Callable[[str], Tensor]) -> tuple[int, ...]:
        rows, pairs = _matrix(where, "weight_packed", read)
        return rows, 2 * pairs

    def weights(self) -> dict[str, Any]:
        return self._arguments(4, "float", scale_dtype="torch.uint8")

    def expert_trouble(self) -> str | None:
        return None


@dataclass(frozen=True)
class Nvfp4PackQuantized(Mxfp4PackQuantized):
    """The same under one FP32 scale per matrix."""

    format: NvFp4
    compression = "nvfp4-pack-quantized"

    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        return super().arrays(shape) | {"weight_global_scale": ArraySpec(torch.float32, (1,))}

    def encode(self, part: QTensor) -> dict[str, Tensor]:
        return super().encode(part) | {"weight_global_scale": part.params["global_scale"].reshape(1)}

    def _ours(self, read: Read, rows: range) -> dict[str, Tensor]:
        return super()._ours(read, rows) | {"global_scale": read("weight_global_scale", None).reshape(1, 1)}

    def weights(self) -> dict[str, Any]:
        return self._arguments(4, "float", scale_dtype="torch.float8_e4m3fn") | {"strategy": "tensor_group"}

    def expert_trouble(self) -> str:
        return "transformers drops the global scales of fused experts; choose mxfp4, or write fewbits instead"


def trouble(format: Format, shape: tuple[int, ...]) -> str | None:
    """Why no layout holds a weight of this format and shape exactly, if none does."""
    held = isinstance(format, Affine | MxFp4 | NvFp4) or (
        isinstance(format, Fp8) and format.exponent == 4 and not isinstance(format.group, int)
    )
    if not held:
        return f"compressed-tensors has no layout for {format}; write the fewbits kind, which holds every format"
    group = format.group if isinstance(format, Grouped) else "row"
    if isinstance(group, int) and shape[-1] % group:
        return (
            f"in_features {shape[-1]} is not a multiple of {format}'s group of {group}, which compressed-tensors "
            "requires; choose a group size that divides it, or a format per row"
        )
    return None


def layout_of(format: Format, *, int8_layout: str) -> Layout:
    """The layout that a format is written in."""
    match format:
        case Affine(bits=8, group="tensor"):
            return IntQuantized(format)
        case Affine(bits=8, group="row") if int8_layout == IntQuantized.compression:
            return IntQuantized(format)
        case Affine():
            return PackQuantized(format)
        case Fp8():
            return FloatQuantized(format)
        case NvFp4():
            return Nvfp4PackQuantized(format)
        case MxFp4():
            return Mxfp4PackQuantized(format)
        case _:
            raise AssertionError(f"{format} was admitted without a layout")


def layout_for(what: str, group: Mapping[str, Any], scale: torch.dtype) -> Layout:
    """The layout that a config group declares, its scales being of type `scale`. Raises CheckpointError if unknown."""
    weights: Mapping[str, Any] = group["weights"]
    groups: dict[Any, Any] = {"channel": "row", "tensor": "tensor", "group": weights.get("group_size")}
    cut: Any = groups.get(str(weights.get("strategy")))
    usual = scale in SCALES and (cut in ("row", "tensor") or (type(cut) is int and cut > 0))
    match group.get("format"), weights:
        case "nvfp4-pack-quantized", {"group_size": 16}:
            return Nvfp4PackQuantized(NvFp4())
        case "mxfp4-pack-quantized", {"group_size": 32}:
            return Mxfp4PackQuantized(MxFp4())
        case "float-quantized", {"num_bits": 8, "type": "float"} if usual and not isinstance(cut, int):
            return FloatQuantized(Fp8(group=cut))
        case ("pack-quantized" | "int-quantized") as name, {"num_bits": int(bits), "type": "int"} if (
            usual and 2 <= bits <= 8
        ):
            format = Affine(bits=bits, group=cut, symmetric=bool(weights.get("symmetric", True)))
            if isinstance(cut, int):
                format = replace(format, group_scale=scale)
            return PackQuantized(format) if name == "pack-quantized" else IntQuantized(format)
        case name, _:
            raise CheckpointError(
                f"{what}: stored as {name} with {dict(weights)}, which fewbits does not read; "
                "start from the floating-point original"
            )


def activation_arguments(format: ActivationFormat | None) -> dict[str, Any] | None:
    """The `input_activations` of a config group, or the `kv_cache_scheme`."""
    if format is None:
        return None
    return {
        "num_bits": 8,
        "type": TYPES[format.element],
        "symmetric": True,
        "strategy": "token" if format.scope == "token" else "tensor",
        "dynamic": not format.static,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }


def activation_format(arguments: Any) -> ActivationFormat | None:
    """The inverse of `activation_arguments`; None for what is none of our formats."""
    if not isinstance(arguments, Mapping):
        return None
    stated = DEFAULTS | {key: arguments[key] for key in DEFAULTS if arguments.get(key) is not None}
    declared = ((format, activation_arguments(format) or {}) for format in ACTIVATIONS.values())
    return next((format for format, known in declared if {key: known[key] for key in DEFAULTS} == stated), None)


def _matrix(where: str, array: str, read: Callable[[str], Tensor]) -> tuple[int, int]:
    shape = tuple(read(array).shape)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(
            f"{where}: {array} is {list(shape)}, must be a matrix; the file is damaged, or its weights are fused"
        )
    return shape[0], shape[1]


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def _turned(matrix: Tensor) -> Tensor:
    """The transpose in memory order. (`contiguous` leaves a single row's strides as they are, and then it cannot be
    viewed as words.)
    """
    return matrix.T.clone(memory_format=torch.contiguous_format)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes as the library counts them, from −2^(bits−1)."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
