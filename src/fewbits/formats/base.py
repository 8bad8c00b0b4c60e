"""Format and QTensor: the two types that everything else passes around.

A *format* says which numbers a tensor can hold and which bytes hold them. It is a frozen dataclass, so a value:
`Affine(bits=4, group=128)`. Five functions define it:

    fit(w, importance)      -> params    choose scales (and zero-points) for the numbers
    round(w, params)        -> codes     nearest code of every number, at fixed params
    decode(codes, params)   -> w         the numbers that the codes stand for
    pack(codes, params)     -> arrays    named arrays, exactly as they lie on disk
    unpack(arrays, shape)   -> codes, params

`fit` only returns params that the bytes can hold exactly, so packing never changes a value; and it is separate from
`round`, so that a method such as GPTQ can fix the params and then round one column at a time (`at_columns`).

Most formats cut each row into groups that share their params. `Grouped` does that cutting once: a tensor of shape
[..., N, K] is seen as [..., N, G, g] (per group), [..., N, 1, K] (per row) or [..., 1, 1, N*K] (per tensor), and every
param has the shape of that view without its last dimension, or one that broadcasts to it. Leading dimensions are
separate matrices (fused experts): they never share a param.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fewbits.errors import FormatError

Params: TypeAlias = Mapping[str, Tensor]
Arrays: TypeAlias = dict[str, Tensor]
Group: TypeAlias = int | Literal["row", "tensor"]

WIDEST = 1024
"""A group that is wider than its row is filled up with zeros to so many columns at most."""
SCALE_TYPES = {torch.float16: "", torch.bfloat16: "-bf16", torch.float32: "-fp32"}
"""What a name says of the type of a group's scales."""
_BITS = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32"}


@dataclass(frozen=True)
class ArraySpec:
    """dtype and shape of one named array of a packed tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Lookup:
    """Rows of a packed matrix whose numbers are (levels[code] − zero) · scale, each step rounded to float32.

    codes: uint8 [N, bytes], a row's codes of `bits` bits as a bit stream (`_bits`), at its end zeros or nothing.
    levels: float32 [2**bits], by the code as it is stored.
    scale: float32 [N, G], or [1, G] where all rows share them, one for each `group` columns. zero: the same, or None
    for 0.
    """

    codes: Tensor
    bits: int
    levels: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int

    def take(self, rows: slice | Tensor) -> Lookup:
        """Some rows, as a slice or as indices (int64 [R])."""
        shared = len(self.scale) < len(self.codes)
        scale, zero = (p if p is None or shared else p[rows] for p in (self.scale, self.zero))
        assert scale is not None
        return replace(self, codes=self.codes[rows], scale=scale, zero=zero)


class Format(ABC):
    """Which numbers a tensor can hold, and which bytes hold them."""

    summary: ClassVar[str]
    """What it is, in one phrase, for `fewbits formats`."""
    purpose: ClassVar[str]
    """What it is good for, in one phrase, for `fewbits explain`."""
    columnwise: ClassVar[bool] = True
    """Whether columns can be rounded one at a time at fixed params, as GPTQ needs."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The registry's key."""

    @property
    @abstractmethod
    def cells(self) -> str:
        """Bit layout of one code, highest bit first: S sign, E exponent, M mantissa, I integer, T trit."""

    @property
    def levels(self) -> Tensor | None:
        """All values a code can stand for at scale 1, ascending (float32); None where there are too many to list."""
        return None

    @property
    def rowwise(self) -> bool:
        """Whether a row's params depend on that row alone, so that a tensor can be quantized a few rows at a time."""
        return True

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise FormatError where a tensor of this shape cannot be held."""
        if len(shape) < 2 or 0 in shape:
            raise FormatError(
                f"{self.name}: shape {list(shape)} is not a non-empty matrix [out_features, in_features]; "
                "keep this tensor in its own dtype"
            )

    @abstractmethod
    def arrays(self, shape: tuple[int, ...]) -> dict[str, ArraySpec]:
        """The named arrays that `pack` makes of a tensor of this shape, in file order."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed tensor of this shape, scales included."""
        return sum(spec.nbytes for spec in self.arrays(shape).values())

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None, *, search: bool = False) -> Params:
        """Choose params for w, float [..., N, K].

        importance: weight of each squared error, >= 0, broadcastable to w ([K] for mean x² of the inputs).
        search: minimise the (weighted) squared error; otherwise take the params from the range alone.
        Raises FormatError if w holds NaN or Inf.
        """

    @abstractmethod
    def round(self, w: Tensor, params: Params) -> Tensor:
        """Codes (an integer dtype, the shape of w) of the numbers nearest to w at these params."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """The numbers, float32, that codes stand for."""

    def plain(self, w: Tensor) -> tuple[Tensor, Params]:
        """Codes and params by the format's reference rounding, without any search.

        Formats with a reference encoder elsewhere (GGUF blocks) return exactly that encoder's codes.
        """
        params = self.fit(w)
        return self.round(w, params), params

    @abstractmethod
    def pack(self, codes: Tensor, params: Params) -> Arrays:
        """Arrays as `arrays` describes them."""

    @abstractmethod
    def unpack(self, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Params]:
        """The inverse of `pack` for a tensor of the given logical shape."""

    def lookup(self, arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Lookup | None:
        """A packed matrix as levels to look up, which compiled code decodes; None where its bytes are of another kind.

        Scales are decoded, codes stay as they are.
        """
        return None

    def at_columns(self, params: Params, columns: Tensor) -> Params:
        """Params of single columns (indices, int64 [C]), broadcastable to [..., N, C]; see `round_at`."""
        raise FormatError(f"{self.name} cannot be rounded one column at a time; use a method that rounds whole tensors")

    def with_scales_in(self, dtype: torch.dtype) -> Format:
        """This format with a group's scales in `dtype`, one of SCALE_TYPES; itself where it has no such choice."""
        return self

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Grouped(Format):
    """A format whose numbers share params by group, row or tensor.

    A subclass gives elementwise `round_at` and `decode_at` at params that broadcast, and `fit_groups` on the grouped
    view. Where `group` does not divide in_features the last group is ragged: it is padded with zeros of importance
    zero, which may not influence a param.
    """

    group: Group = "row"

    @property
    def rowwise(self) -> bool:
        return self.group != "tensor"

    @property
    def span(self) -> Group:
        """Neighbours whose params are fitted together: those of a group, or of several under a scale above theirs."""
        return self.group

    def fitted_together(self, sums: Tensor) -> Tensor:
        """What a method summed by group, [..., N, G], summed over all groups whose params only move together."""
        if not isinstance(self.span, int) or self.span == self.group:
            return sums
        each = self.span // int(self.group)
        whole: Tensor = sums.unflatten(-1, (-1, each)).sum(-1)
        return whole.repeat_interleave(each, dim=-1)

    @property
    def suffix(self) -> str:
        """The group's part of the name: nothing for a row, the default."""
        match self.group:
            case "row":
                return ""
            case "tensor":
                return "-tensor"
            case _:
                return f"-g{self.group}"

    @abstractmethod
    def fit_groups(self, x: Tensor, importance: Tensor | None, *, search: bool) -> Params:
        """Params for x, float32 in the grouped view [..., g]; importance broadcasts to x."""

    @abstractmethod
    def round_at(self, x: Tensor, params: Params) -> Tensor:
        """Codes of x at params that broadcast to it."""

    @abstractmethod
    def decode_at(self, codes: Tensor, params: Params) -> Tensor:
        """Numbers (float32) of codes at params that broadcast to them."""

    def scale_at(self, params: Params) -> Tensor:
        """What a level is multiplied by, in the shape of the params."""
        return params["scale"]

    def offset_at(self, params: Params) -> Tensor:
        """What is added to that product."""
        return torch.zeros_like(self.scale_at(params))

    def fit(self, w: Tensor, importance: Tensor | None = None, *, search: bool = False) -> Params:
        self.check(tuple(w.shape))
        x = self.grouped(w.float().contiguous())  # sums must not depend on strides
        if importance is not None:
            importance = self.grouped(importance.float().expand(w.shape))
        elif self._padding(w.shape[-1]):
            importance = self.grouped(torch.ones_like(w, dtype=torch.float32))
        params = self.fit_groups(x, importance, search=search)
        require_finite(w, params, self.name)
        return params

    def round(self, w: Tensor, params: Params) -> Tensor:
        return self.ungrouped(self.round_at(self.grouped(w.float()), _unsqueezed(params)), w.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.ungrouped(self.decode_at(self.grouped(codes), _unsqueezed(params)), codes.shape)

    def least_error(self, x: Tensor, candidates: Sequence[Params], importance: Tensor | None) -> Params:
        """For every group of x (grouped view) the candidate with the least squared error; a tie goes to the first.

        A search ends here, with the params from the range as first candidate, so that searching never makes it worse.
        Params of another shape than [..., G] (one per matrix) must be the same in all candidates.
        """
        best, least = dict(candidates[0]), torch.full(x.shape[:-1], torch.inf, device=x.device)
        for params in candidates:
            at = _unsqueezed(params)
            residual = self.decode_at(self.round_at(x, at), at).sub_(x).square_()
            error = (residual if importance is None else residual.mul_(importance)).sum(-1)
            better = error < least
            best = {k: torch.where(better, p, best[k]) if p.shape == error.shape else p for k, p in params.items()}
            least = torch.where(better, error, least)
        return best

    def at_columns(self, params: Params, columns: Tensor) -> Params:
        if not isinstance(self.group, int):
            return params
        groups = columns // self.group
        return {key: p[..., groups] if p.shape[-1] > 1 else p for key, p in params.items()}

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        """Params under which levels are multiplied by `scale` and the lowest level stands for `lowest`, both float32
        in the shape of `groups`: the inverse of `scale_at` and `offset_at`. A format whose levels cannot be moved
        leaves `lowest` to its scale.

        Raises FormatError where the bytes cannot hold them exactly, or scales are not free (two levels of them).
        """
        raise FormatError(f"{self.name}: its scales are made of others above them, and hold no given ones")

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        """Params under which the same codes stand for numbers `factor` times as large, as nearly as bytes can hold.

        factor: broadcasts to the scale. The same params where the scale is not free to move by itself (powers of two,
        double quantization).
        """
        return params

    def _lookup(
        self, codes: Tensor, shape: tuple[int, int], levels: Tensor, scale: Tensor, zero: Tensor | None = None
    ) -> Lookup:
        """`Lookup` of packed codes [N, words] in any dtype, and of params in the shape of `groups`."""
        bits, group = len(self.cells), self.group if isinstance(self.group, int) else shape[1]
        return Lookup(codes.view(torch.uint8), bits, levels, scale, zero, group)

    def groups(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the params of a tensor of this shape."""
        match self.group:
            case "tensor":
                return (*shape[:-2], 1, 1)
            case "row":
                return (*shape[:-1], 1)
            case _:
                return (*shape[:-1], math.ceil(shape[-1] / self.group))

    def _padding(self, in_features: int) -> int:
        """Zeros at a row's end."""
        return -in_features % self._width(in_features) if isinstance(self.group, int) else 0

    def _width(self, in_features: int) -> int:
        """Columns of a group in the grouped view. One far wider than the row, as a file may claim, ends with it."""
        return min(int(self.group), max(in_features, WIDEST))

    def grouped(self, w: Tensor) -> Tensor:
        """The grouped view [..., g] of w [..., N, K], padded with zeros where the last group is ragged."""
        match self.group:
            case "tensor":
                return w.reshape(*w.shape[:-2], 1, 1, -1)
            case "row":
                return w.unsqueeze(-2)
            case _:
                padding = self._padding(w.shape[-1])
                padded = torch.nn.functional.pad(w, (0, padding)) if padding else w
                return padded.reshape(*w.shape[:-1], -1, self._width(w.shape[-1]))

    def ungrouped(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `grouped` for a tensor of this shape."""
        if self.group == "tensor":
            return x.reshape(shape)
        return x.flatten(-2)[..., : shape[-1]].contiguous()


@dataclass(frozen=True)
class Scaled(Grouped):
    """A Grouped format whose scales take 16 bits where there is one per group, and FP32 per row or tensor (for free).

    The 16-bit type is FP16 unless `with_scales_in` says BF16: engines load scales in the model's own type, and a scale
    that has to be converted there is another scale. So it can be FP32 too, where another program wrote that.
    """

    group_scale: torch.dtype = torch.float16

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.group_scale if isinstance(self.group, int) else torch.float32

    @property
    def suffix(self) -> str:
        return super().suffix + (SCALE_TYPES[self.scale_dtype] if isinstance(self.group, int) else "")

    def with_scales_in(self, dtype: torch.dtype) -> Format:
        return replace(self, group_scale=dtype) if isinstance(self.group, int) else self

    def stored(self, scale: Tensor) -> Tensor:
        """The scale, float32, as its bytes will hold it."""
        return scale.to(self.scale_dtype).float()

    def rescaled(self, params: Params, factor: Tensor) -> Params:
        return {**params, "scale": self.stored(params["scale"] * factor)}

    def placed(self, scale: Tensor, lowest: Tensor) -> Params:
        return {"scale": exactly(scale, self.scale_dtype, f"{self.name}: a scale")}


@dataclass(frozen=True, eq=False)
class QTensor:
    """A tensor in a format: what methods make, checkpoints store and kernels run.

    codes has the logical shape ([out_features, in_features], or more dimensions for fused experts); params is what the
    format's `fit` returned.
    """

    format: Format
    codes: Tensor
    params: Params

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.codes.numel()

    def dequantize(self) -> Tensor:
        """The numbers, float32, in the logical shape."""
        return self.format.decode(self.codes, self.params)

    def pack(self) -> Arrays:
        return self.format.pack(self.codes, self.params)

    @classmethod
    def from_arrays(cls, format: Format, arrays: Mapping[str, Tensor], shape: tuple[int, ...]) -> QTensor:
        """Read packed arrays back. Raises FormatError where one is missing or has another dtype or shape."""
        for name, spec in format.arrays(shape).items():
            found = arrays.get(name)
            if found is None or found.dtype != spec.dtype or tuple(found.shape) != spec.shape:
                got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise FormatError(
                    f"{format.name}: array '{name}' of a {list(shape)} tensor must be {spec.dtype} "
                    f"{list(spec.shape)}, found {got}; the file was written for another format or is damaged"
                )
        codes, params = format.unpack(arrays, shape)
        return cls(format, codes, params)


def require_finite(w: Tensor, params: Params, name: str) -> None:
    """Raise FormatError if w holds NaN or Inf.

    Every fit reduces over the whole tensor, so a bad number shows in its params: the tensor itself is only read again
    to say how many there are.
    """
    if all(p.is_floating_point() is False or bool(p.isfinite().all()) for p in params.values()):
        return
    bad = int((~w.isfinite()).sum())
    if bad:
        raise FormatError(
            f"{name}: {bad} of {w.numel()} weights are NaN or Inf; a quantized tensor must be finite, "
            "so repair the source checkpoint first"
        )
    raise FormatError(
        f"{name}: a scale overflows its stored type (largest weight {float(w.abs().max()):g}); "
        "use a format with wider scales"
    )


def exactly(numbers: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """The numbers, float32. Raises FormatError with the first that is none of `dtype`, called `what`."""
    stored = numbers.to(dtype).float()
    other = stored != numbers
    if bool(other.any()):
        found, nearest = float(numbers[other][0]), float(stored[other][0])
        raise FormatError(f"{what} is {found:.9g}, must be in {_BITS[dtype]} (the nearest is {nearest:.9g})")
    return stored


def _unsqueezed(params: Params) -> Params:
    return {key: p.unsqueeze(-1) for key, p in params.items()}
