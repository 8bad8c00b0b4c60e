"""gptq and gptq-v2: integers as GPTQModel, AutoGPTQ and their many readers (vLLM, transformers, …) lay them down.

A linear layer `M` with weight [N, K] of b bits, b one of 2, 3, 4, 8, in groups of g columns becomes

    M.qweight  int32 [⌈K·b/32⌉, N]      codes, unsigned, a stream down each column, lowest bit first
    M.scales   float16 [⌈K/g⌉, N]
    M.qzeros   int32 [⌈K/g⌉, ⌈N·b/32⌉]  zero-points, a stream along each row
    M.g_idx    int32 [K]                the group of each column: k // g, unless `desc_act` took them in another order

with W[n, k] = scales[g_idx[k], n] · (q[k, n] − z[g_idx[k], n]). bfloat16 models have bfloat16 scales, since loaders
take them in the model's type. config.json has

    "quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 128,
                            "sym": true, "desc_act": false, "dynamic": {"-:^lm_head$": {}}, …}

group_size −1 is one group for all columns. `sym` says that every zero-point is 2^(b−1), which kernels may take for
granted. `dynamic` has expressions of module names, the first that matches decides: after `-:` the module is not
quantized, else it has the values given there instead of the general ones.

Version 1 (`gptq`) stores z − 1, version 2 (`gptq_v2`) stores z. In version 1 a zero-point of 0 has no code of its own:
GPTQModel subtracts and adds 1 in whole words, where it borrows from its neighbour, and for 3 bits in each field; others
read 2^b, or 0 without the loan. So fewbits refuses to write one (version 2 can), and reads one as GPTQModel's loader
does, with a warning. GPTQModel itself loads version 1 with zero-points only if `meta` says that it wrote the file, so
such models are better written in version 2.

One scale a row, in float32 here, is written as group_size −1 if each is a float16 number, else refused. Refused too:
codes that fill no whole words, groups that do not divide in_features (GPTQModel alone would take them), 5 to 7 bits
(whose layout is another, with its bits in planes). Sources: nn_modules/qlinear and utils/model.py of GPTQModel 7.6.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.checkpoint import _columns as columns
from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, read_json
from fewbits.checkpoint._columns import ColumnReader, ColumnWriter, Layout, Read
from fewbits.checkpoint._ct_targets import compact
from fewbits.checkpoint._expressions import matches
from fewbits.checkpoint._gptqmodel import decoded_by_gptqmodel
from fewbits.checkpoint.activations import WEIGHT
from fewbits.checkpoint.base import Entry, Kind, Reader, Writer
from fewbits.checkpoint.huggingface import require_admitted
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import Affine, Arrays, ArraySpec, Float, Format, QTensor
from fewbits.formats._bits import pack_bits, unpack_bits, words
from fewbits.formats.act_order import ActOrder

METHOD = "gptq"
BESIDE = "quantize_config.json"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
BITS = (2, 3, 4, 8)
SCALES = (torch.float16, torch.bfloat16)  # and of rows what is one of the former, see `Columns.encode`
OUTPUT = "lm_head"

log = logging.getLogger(__name__)


class Gptq(Kind):
    """Version 1, which every engine reads."""

    name = "gptq"
    summary = "safetensors folder of integers in groups: vLLM and GPTQModel"
    decoder = "gptqmodel" if find_spec("gptqmodel") else None
    version: ClassVar[int] = 1
    fine_rows = False  # theirs are in 16 bits

    def detect(self, path: Path) -> bool:
        try:
            quantization = columns.read_quantization(path, BESIDE, METHOD)
        except CheckpointError:
            return False
        second = _layout_name(quantization) == "gptq_v2"
        return quantization.get("quant_method") == METHOD and second == (self.version == 2)

    def open(self, path: Path) -> Reader:
        quantization = columns.read_quantization(path, BESIDE, METHOD)
        _version(path, quantization)
        return ColumnReader(path, read_json(path / CONFIG), lambda module, folder: _found(module, folder, quantization))

    def admits(self, entry: Entry) -> str | None:
        trouble = columns.common_trouble(self.name, entry)
        if trouble or isinstance(entry.format, Float):
            return trouble
        integers = _integers(entry.format)
        if integers is None or integers.bits not in BITS or integers.group_scale not in SCALES:
            return (
                f"{entry.name}: GPTQ has integers of {', '.join(map(str, BITS))} bits with 16-bit scales, not "
                f"{entry.format}; choose int4-g128, or write fewbits instead"
            )
        return columns.group_trouble("GPTQ", entry, integers) or columns.words_trouble("GPTQ", entry, integers.bits)

    def number_trouble(self, entry: Entry, part: QTensor) -> str | None:
        integers = _integers(entry.format)
        if integers is None:
            return None
        zero = part.params.get("zero")
        return columns.narrow_trouble(entry.name, part.params["scale"], integers.group_scale) or (
            None if zero is None else _zero_trouble(entry.name, zero, self.version)
        )

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        require_admitted(self, entries)
        layouts = {e.name: self._layout(e) for e in entries if not isinstance(e.format, Float)}
        if self.version == 1 and not all(layout.integers.symmetric for layout in layouts.values()):
            log.warning("%s: GPTQModel loads version 1 with zero-points only where it wrote it; it loads gptq-v2", path)
        quantization = quantization_config(layouts, list(columns.matrices(entries)), self.version) if layouts else None
        return ColumnWriter(path, entries, source, config, layouts, quantization)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]]:
        return decoded_by_gptqmodel(path)

    def _layout(self, entry: Entry) -> Columns:
        integers = _integers(entry.format)
        assert integers is not None
        shape = (entry.shape[0], entry.shape[1])
        return Columns(entry.name, entry.format, shape, integers.group_scale, entry.name, self.version)


class GptqV2(Gptq):
    """Version 2, for zero-points of 0."""

    name = "gptq-v2"
    summary = "the same with zero-points as they are, so that 0 can be one: GPTQModel and vLLM"
    version = 2


@dataclass(frozen=True)
class Columns(Layout):
    """One weight. listed: whether there is a `g_idx`."""

    version: int
    listed: bool = True

    @property
    def integers(self) -> Affine:
        found = _integers(self.format)
        assert found is not None
        return found

    @property
    def neutral(self) -> int:
        """The zero-point of symmetric codes."""
        return 1 << (self.integers.bits - 1)

    def arrays(self) -> dict[str, ArraySpec]:
        (rows, inputs), bits = self.shape, self.integers.bits
        groups = self.integers.groups(self.shape)[-1]
        specs = {
            "qweight": ArraySpec(torch.int32, (words(inputs, bits), rows)),
            "qzeros": ArraySpec(torch.int32, (groups, words(rows, bits))),
            "scales": ArraySpec(self.scales, (groups, rows)),
        }
        return specs | ({"g_idx": ArraySpec(torch.int32, (inputs,))} if self.listed else {})

    def decode(self, read: Read, rows: range) -> QTensor:
        part = slice(rows.start, rows.stop)
        zeros = self._zeros(read("qzeros"), rows)
        arrays = {
            "packed": columns.turned(read("qweight")[:, part]),
            "scale": columns.finite(self.where, columns.turned(read("scales")[:, part])).to(self.integers.scale_dtype),
        }
        if not self.integers.symmetric:
            arrays["zero"] = columns.turned(zeros)
        elif bool((zeros != self.neutral).any()):
            other = int(zeros[zeros != self.neutral][0])
            raise CheckpointError(
                f"{self.where}: {CONFIG} says sym, so every zero-point is {self.neutral}, but qzeros holds {other}; "
                'download both again, or say "sym": false there to read it as it is'
            )
        if isinstance(self.format, ActOrder):
            arrays["order"] = read("g_idx")
        return QTensor.from_arrays(self.format, arrays, (len(rows), self.shape[1]))

    def _zeros(self, stored: Tensor, rows: range) -> Tensor:
        """Zero-points [G, rows]."""
        bits = self.integers.bits
        span, skipped = columns.zeros_span(rows, bits)
        stream, count = stored[:, span].contiguous(), skipped + len(rows)
        if self.version == 1:
            if bool((unpack_bits(stream, bits, count) == (1 << bits) - 1).any()):
                _warn_of_zero(self.where)
            stream = stream if bits == 3 else stream + _ones(bits)
        zeros = unpack_bits(stream, bits, count)[:, skipped:]
        return zeros + 1 & 7 if self.version == 1 and bits == 3 else zeros

    def encode(self, whole: Arrays) -> dict[str, Tensor]:
        zero = whole.get("zero", torch.full(whole["scale"].shape, self.neutral, dtype=torch.uint8))
        scale = columns.narrowed(self.name, whole["scale"], self.scales)
        trouble = _zero_trouble(self.name, zero, self.version)
        if trouble is not None:
            raise UnsupportedError(trouble)
        order = whole.get("order", ActOrder(self.integers).neighbours(self.shape[1]))
        return {
            "qweight": columns.turned(whole["packed"]),
            "qzeros": pack_bits(columns.turned(zero) - int(self.version == 1), self.integers.bits),
            "scales": columns.turned(scale),
            "g_idx": order,
        }


def quantization_config(layouts: Mapping[str, Columns], linear: Sequence[str], version: int) -> dict[str, Any]:
    """The `quantization_config` of these weights. linear: every linear layer, quantized or not."""
    schemes = {name.removesuffix(WEIGHT): _scheme_of(layout) for name, layout in layouts.items()}
    linear = [module for module in linear if module != OUTPUT or module in schemes]  # `lm_head` speaks for that one
    (usual, _), *others = Counter(schemes.values()).most_common()
    lists = [[module for module in linear if schemes.get(module) == s] for s in (None, *(s for s, _ in others), usual)]
    kept, *different = (sorted(expression.removeprefix("re:") for expression in found) for found in compact(lists)[:-1])
    dynamic: dict[str, Any] = {f"-:{expression}": {} for expression in kept}
    for (scheme, _), expressions in zip(others, different, strict=True):
        dynamic |= {f"+:{expression}": scheme.settings() for expression in expressions}
    return {
        "quant_method": METHOD,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **usual.settings(),
        "lm_head": OUTPUT in schemes,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"fewbits:{metadata.version('fewbits')}"]},
    }


@dataclass(frozen=True)
class Scheme:
    """How a module is stored, as the configuration says it; group −1: all columns."""

    bits: int
    group: int
    symmetric: bool
    act_order: bool | None

    def settings(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group_size": self.group,
            "sym": self.symmetric,
            "desc_act": bool(self.act_order),
        }


def _scheme_of(layout: Columns) -> Scheme:
    integers = layout.integers
    group = integers.group if isinstance(integers.group, int) else -1
    return Scheme(integers.bits, group, integers.symmetric, isinstance(layout.format, ActOrder))


def _integers(format: Format) -> Affine | None:
    """The integers of a format, if it is made of them."""
    found = format.integers if isinstance(format, ActOrder) else format
    return found if isinstance(found, Affine) else None


def _zero_trouble(name: str, zero: Tensor, version: int) -> str | None:
    """Why this version cannot store these zero-points, if it cannot."""
    if version != 1 or not bool((zero == 0).any()):
        return None
    return (
        f"{name}: a zero-point is 0, and GPTQ's version 1 stores zero-points less 1, where engines read "
        "that differently; write gptq-v2 instead, or choose a symmetric format"
    )


def _layout_name(quantization: Mapping[str, Any]) -> Any:
    found = quantization.get("checkpoint_format", quantization.get("format"))
    return "gptq" if found is None else found


def _version(path: Path, quantization: Mapping[str, Any]) -> int:
    """1 or 2; raises CheckpointError for layouts that are neither."""
    found, dtype = _layout_name(quantization), quantization.get("pack_dtype", "int32")
    if not isinstance(found, str) or found not in VERSIONS or dtype != "int32":
        raise CheckpointError(
            f"{path / CONFIG}: checkpoint_format is {found!r} in words of {dtype!r}, and fewbits reads "
            f"{' and '.join(VERSIONS)} in int32; save it as one of them with GPTQModel, or start from the original"
        )
    return VERSIONS[found]


def _found(module: str, folder: ArrayFolder, quantization: Mapping[str, Any]) -> Columns:
    """The layout of a module as configuration and arrays say; raises CheckpointError if they disagree."""
    columns.require_linear(folder.folder, module)
    where = f"{folder.folder}: '{module}'"
    scheme = _scheme(where, module, quantization)
    listed = f"{module}.g_idx" in folder.arrays
    packed, rows = columns.matrix_shape(folder, f"{module}.qweight")
    inputs = folder.located(f"{module}.g_idx").shape[0:1] if listed else (packed * 32 // scheme.bits,)
    if not inputs or not inputs[0]:
        raise CheckpointError(f"{where}: g_idx is empty, must have the group of each column; the file is damaged")
    shape, scales = (rows, inputs[0]), columns.scale_dtype(folder, f"{module}.scales")
    integers = columns.integers(scheme.bits, scheme.group, shape, scales, symmetric=scheme.symmetric)
    plain = Columns(module + WEIGHT, integers, shape, scales, where, _version(folder.folder, quantization), listed)
    return replace(plain, format=ActOrder(integers)) if listed and _permuted(plain, scheme, folder) else plain


def _permuted(layout: Columns, scheme: Scheme, folder: ArrayFolder) -> bool:
    """Whether groups are not neighbours. Raises CheckpointError for groups that do not exist."""
    found = folder.located(columns.local(layout.name, "g_idx"))
    if found.dtype != torch.int32 or found.shape != layout.shape[1:]:
        stored = f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(f"{layout.where}: g_idx is {stored}, must be int32 [in_features]; the file is damaged")
    order = found.read()
    if torch.equal(order, ActOrder(layout.integers).neighbours(layout.shape[1])):
        return False
    groups = layout.integers.groups(layout.shape)[-1]
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise CheckpointError(
            f"{layout.where}: g_idx has group {int(order.min())} to {int(order.max())}, but group_size {scheme.group} "
            f"of {CONFIG} makes {groups}; the file is damaged or belongs to another configuration"
        )
    if scheme.act_order is False:
        raise CheckpointError(
            f"{layout.where}: g_idx has the columns in another order, but {CONFIG} says desc_act false; engines read "
            'that differently, so download both again, or say "desc_act": true there if g_idx is right'
        )
    return True


def _scheme(where: str, module: str, quantization: Mapping[str, Any]) -> Scheme:
    settings = {**quantization, **_override(where, module, quantization.get("dynamic"))}
    bits, group = settings.get("bits"), settings.get("group_size", 128)
    symmetric, act_order = settings.get("sym", True), settings.get("desc_act")
    numbers = isinstance(bits, int) and bits in BITS and isinstance(group, int) and (group == -1 or group > 0)
    if not numbers or not isinstance(symmetric, bool) or not isinstance(act_order, bool | None):
        raise CheckpointError(
            f"{where}: {CONFIG} says bits {bits!r}, group_size {group!r}, sym {symmetric!r}, desc_act {act_order!r}; "
            f"fewbits reads bits {', '.join(map(str, BITS))}, a group_size above 0 or −1, and true or false"
        )
    return Scheme(int(settings["bits"]), int(group), symmetric, act_order)


def _override(where: str, module: str, dynamic: Any) -> Mapping[str, Any]:
    """What the first matching expression of `dynamic` says."""
    if not dynamic:
        return {}
    if not isinstance(dynamic, dict) or not all(isinstance(v, dict) for v in dynamic.values()):
        raise CheckpointError(f"{where}: dynamic in {CONFIG} must have an object for each expression; it is damaged")
    for pattern, settings in dynamic.items():
        try:
            found = matches(re.sub("^[-+]:", "", pattern), module)
        except ValueError as error:
            raise CheckpointError(f"{where}: dynamic in {CONFIG}: {error}") from error
        if found and pattern.startswith("-:"):
            raise CheckpointError(
                f"{where}: {CONFIG} says that it is not quantized ({pattern!r}), but '{module}.qweight' is there; "
                "download both again"
            )
        if found:
            return dict(settings)
    return {}


@cache
def _warn_of_zero(where: str) -> None:
    """Once for each weight, whose rows are read in several parts."""
    log.warning("%s: a zero-point of 0 in version 1, which engines read differently; read as GPTQModel does", where)


def _ones(bits: int) -> int:
    """1 in each field of a word."""
    return sum(1 << at for at in range(0, 32, bits))
