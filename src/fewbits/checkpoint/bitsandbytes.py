"""bitsandbytes: NF4, FP4 and LLM.int8() as transformers saves them (functional.py and nn/modules.py of bitsandbytes).

A linear layer `M` with weight [N, K] in 4 bits becomes

    M.weight                uint8 [N·K/2, 1]    codes in row-major order, the first of two in the high nibble
    M.weight.absmax         float32 [⌈N·K/B⌉]   the scale of each block of B = 64 (32 … 4096) codes in that order
    M.weight.quant_map      float32 [16]        the table
    M.weight.quant_state.bitsandbytes__nf4      uint8: JSON with quant_type, blocksize, dtype, shape

and in 8 bits

    M.weight  int8 [N, K]       M.SCB  float32 [N], the largest magnitude of each row       M.weight_format  uint8, 0

`quantization_config` has one of load_in_4bit and load_in_8bit, and in llm_int8_skip_modules what stays as it is.

Blocks run on from row to row. Where B divides K they are groups of a row; elsewhere groups of gcd(B, K) columns never
cross from one block into the next, so they hold the same scales, several times. Scales that are quantized themselves
(double quantization: absmax uint8 into a map of 256 numbers, times nested_absmax per 256, plus an offset) are decoded
as bitsandbytes does it and held in FP32: its map is not the one of `nf4-dq`, so such a file has the numbers that it has
there, and takes 0.37 bits more per weight elsewhere. The weight may be stored in another type of the same bytes.

bitsandbytes decodes 4 bits as table[code] · absmax and 8 bits as (code · SCB) · 0.007874016, all in float32. When
it multiplies in 8 bits it also rounds the inputs, except for outliers: fewbits measures and runs the weights alone.

Refused when written: groups that do not divide in_features, 4 bits beside 8 (one configuration cannot say both),
embeddings and experts (only linear layers are replaced by transformers).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbits.checkpoint._arrays import CONFIG, ArrayFolder, Located, read_json
from fewbits.checkpoint._quantized_folder import QuantizedFolder
from fewbits.checkpoint._writer import FolderWriter
from fewbits.checkpoint.activations import EMBEDDING, EXPERT, WEIGHT
from fewbits.checkpoint.base import FOREIGN_PART, Entry, Reader, Writer, row_slabs
from fewbits.checkpoint.bitnet import OUTPUTS, patterns
from fewbits.checkpoint.huggingface import quantization_of, require_admitted, rows_by_the_library
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.formats import ArraySpec, Float, Format, QTensor
from fewbits.formats.codebook import Codebook, Fp4, NormalFloat
from fewbits.formats.llm_int8 import LlmInt8

METHOD = "bitsandbytes"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES: dict[str, type[Codebook]] = {"nf4": NormalFloat, "fp4": Fp4}
STATE = ".quant_state.bitsandbytes__"  # and one of TYPES
SCB, LAYOUT = ".SCB", ".weight_format"
NESTED_MAP = 256  # numbers that a byte of a quantized scale stands for
LONGEST_STATE = 1 << 16  # bytes of JSON; a state has about a hundred
SAME = 1e-6  # how far a table may be off: bitsandbytes' own measure of equal states
STORED = (torch.float32, torch.float16, torch.bfloat16)


class BitsAndBytes(QuantizedFolder):
    """Holds NF4, FP4 and LLM.int8()."""

    name = METHOD
    summary = "safetensors folder of 4-bit or 8-bit matrices: transformers with bitsandbytes, PEFT"
    decoder = METHOD if find_spec("bitsandbytes") else None

    def recognises(self, path: Path) -> bool:
        return _is_ours(quantization_of(read_json(path / CONFIG)))

    def open(self, path: Path) -> Reader:
        return BitsAndBytesReader(path)

    def trouble(self, entry: Entry) -> str | None:
        return _format_trouble(entry) or _name_trouble(entry)

    def file_bytes(self, format: Format, shape: tuple[int, ...]) -> int:
        if isinstance(format, Float):
            return super().file_bytes(format, shape)
        return sum(spec.nbytes for spec in _arrays(Entry(WEIGHT, shape, format), "bfloat16").values())

    def create(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> Writer:
        require_admitted(self, entries)
        found: dict[type[Format], Entry] = {}
        for entry in entries:
            if not isinstance(entry.format, Float):
                found.setdefault(type(entry.format), entry)
        if len(found) > 1:
            a, b = list(found.values())[:2]
            raise UnsupportedError(
                f"{a.name} is {a.format} and {b.name} is {b.format}, but a bitsandbytes folder has one type for all "
                "its matrices; choose one, or write fewbits instead"
            )
        return BitsAndBytesWriter(path, entries, source, config)

    def foreign(self, path: Path) -> Iterator[tuple[str, int, Tensor]] | None:
        """Numbers as bitsandbytes dequantizes them, to float32."""
        return _decoded_by_the_library(BitsAndBytesReader(path)) if find_spec("bitsandbytes") else None


@dataclass(frozen=True)
class FourBit:
    """A packed matrix as its state describes it."""

    name: str
    shape: tuple[int, int]
    block: int
    type: str
    nested_block: int | None = None
    offset: float = 0.0

    NESTED: ClassVar = ("nested_absmax", "nested_quant_map")

    @property
    def format(self) -> Codebook:
        return TYPES[self.type](group=math.gcd(self.block, self.shape[1]))

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block)

    def parts(self) -> dict[str, tuple[tuple[torch.dtype, ...], int]]:
        """The arrays beside the codes: types that they may have, and how many numbers."""
        plain: dict[str, tuple[tuple[torch.dtype, ...], int]] = {"quant_map": (STORED, 16)}
        if self.nested_block is None:
            return plain | {"absmax": (STORED, self.blocks)}
        return plain | {
            "absmax": ((torch.uint8,), self.blocks),
            "nested_absmax": (STORED, -(-self.blocks // self.nested_block)),
            "nested_quant_map": (STORED, NESTED_MAP),
        }


class BitsAndBytesReader(Reader):
    """Entries named as before, in 4 or 8 bits where the arrays say so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self._quantization = quantization_of(self.config)
        self.config.pop("quantization_config", None)
        self.folder = ArrayFolder(path)
        self.four: dict[str, FourBit] = {}
        self.eight: set[str] = set()
        for name in self.folder.arrays:
            weight, state, type = name.partition(STATE)
            if state:
                self.four[weight] = self._four_bit(weight, type)
            elif name.endswith(SCB):
                self.eight.add(self._eight_bit(name))
        self._require_configured()
        self.entries = {entry.name: entry for entry in self._entries()}

    def read(self, name: str, rows: slice | None = None) -> QTensor:
        entry = self.entries.get(name)
        if entry is None or isinstance(entry.format, Float):
            array = self.folder.read(name, rows)
            return QTensor(Float(array.dtype), array, {})
        if name in self.eight:
            absmax = self.folder.located(_module(name) + SCB)
            scale = replace(absmax, shape=(entry.shape[0], 1)).rows(rows).read().float()
            return QTensor(entry.format, self.folder.read(name, rows), {"absmax": self._finite(scale, name, SCB)})
        state = self.four[name]
        span = _span(self.path, state, rows)
        return QTensor(entry.format, self._codes(state, span), {"scale": self._scales(state, span)})

    def digests(self, name: str) -> dict[str, str]:
        return {array: self.folder.located(array).sha256() for array in self.arrays_of(name)}

    def arrays_of(self, name: str) -> list[str]:
        """The arrays that an entry is made of, by name in the file."""
        if name in self.four:
            state = self.four[name]
            return [name, *(f"{name}.{part}" for part in state.parts()), name + STATE + state.type]
        if name in self.eight:
            extra = [_module(name) + LAYOUT] if _module(name) + LAYOUT in self.folder.arrays else []
            return [name, _module(name) + SCB, *extra]
        return [name]

    def scales(self, state: FourBit, blocks: slice) -> Tensor:
        """Scales of some blocks, float32, as bitsandbytes decodes them."""
        absmax = self._part(state, "absmax", blocks)
        if state.nested_block is None:
            return self._finite(absmax.float(), state.name, ".absmax")
        of_block = torch.arange(blocks.start, blocks.stop) // state.nested_block
        level = self._part(state, "nested_quant_map").float().index_select(0, absmax.int())
        scale = level * self._part(state, "nested_absmax").float()[of_block]
        return self._finite(scale.add_(torch.tensor(state.offset)), state.name, ".nested_absmax")

    def _entries(self) -> Iterator[Entry]:
        taken = {array for name in (*self.four, *self.eight) for array in self.arrays_of(name)}
        for name, array in self.folder.arrays.items():
            if name in self.four:
                yield Entry(name, self.four[name].shape, self.four[name].format)
            elif name in self.eight:
                yield Entry(name, array.shape, LlmInt8())
            elif name not in taken:
                yield self._plain(name, array)

    def _plain(self, name: str, array: Located) -> Entry:
        if name.endswith(WEIGHT) and not array.dtype.is_floating_point:
            raise CheckpointError(
                f"{array.file}: '{name}' is {array.dtype} {list(array.shape)}, but neither '{name}{STATE}…' nor "
                f"'{_module(name)}{SCB}' says what its codes stand for; download all shards again"
            )
        return Entry(name, array.shape, Float(array.dtype))

    def _four_bit(self, name: str, type: str) -> FourBit:
        if name in self.four:
            raise CheckpointError(f"{self.path}: '{name}' has two states, {type} and {self.four[name].type}")
        where = self.folder.located(name + STATE + type)
        facts = _state(where, name + STATE + type)
        state = _checked_state(f"{where.file}: '{name}{STATE}{type}'", name, type, facts)
        packed = self.folder.located(name)
        if packed.nbytes != -(-math.prod(state.shape) // 2):
            raise CheckpointError(
                f"{packed.file}: '{name}' has {packed.nbytes} bytes, but {list(state.shape)} in 4 bits takes "
                f"{-(-math.prod(state.shape) // 2)}; the file is damaged"
            )
        for part, (dtypes, count) in state.parts().items():
            found = self.folder.located(f"{name}.{part}")
            if found.dtype not in dtypes or math.prod(found.shape) != count:
                raise CheckpointError(
                    f"{found.file}: '{name}.{part}' is {found.dtype} {list(found.shape)}, must be {count} of "
                    f"{dtypes[0]} for {list(state.shape)} in blocks of {state.block}; the file is damaged"
                )
        self._require_table(state)
        return state

    def _require_table(self, state: FourBit) -> None:
        """bitsandbytes decodes with its own tables, whatever the file says, so another one would be decoded wrongly."""
        found = self._part(state, "quant_map").float()
        if not torch.allclose(found, torch.tensor(TYPES[state.type].table), rtol=0, atol=SAME):
            raise CheckpointError(
                f"{self.path}: '{state.name}.quant_map' is not the table of {state.type}, though its state has that "
                "type; the file is damaged or of another program"
            )

    def _eight_bit(self, name: str) -> str:
        weight = name.removesuffix(SCB) + WEIGHT
        codes, absmax = self.folder.located(weight), self.folder.located(name)
        if codes.dtype != torch.int8 or len(codes.shape) != 2 or 0 in codes.shape:
            raise CheckpointError(
                f"{codes.file}: '{weight}' is {codes.dtype} {list(codes.shape)}, but '{name}' beside it belongs to an "
                "int8 matrix; the file is damaged"
            )
        if absmax.dtype not in STORED or math.prod(absmax.shape) != codes.shape[0]:
            raise CheckpointError(
                f"{absmax.file}: '{name}' is {absmax.dtype} {list(absmax.shape)}, must be float32 [{codes.shape[0]}], "
                "one for each row; the file is damaged"
            )
        layout = self.folder.arrays.get(name.removesuffix(SCB) + LAYOUT)
        if layout is not None and (layout.dtype != torch.uint8 or layout.nbytes != 1 or bool(layout.read().any())):
            raise CheckpointError(
                f"{layout.file}: '{weight}' has its codes in the order of an old GPU's kernels (weight_format), which "
                "bitsandbytes itself has given up; save the model again from the original"
            )
        return weight

    def _require_configured(self) -> None:
        """Raise CheckpointError where config.json says other bits, or another type, than the arrays have."""
        four, eight = (_says(self._quantization, f"load_in_{bits}bit") for bits in (4, 8))
        kind = self._quantization.get("bnb_4bit_quant_type")
        for state in self.four.values():
            if not four or (kind is not None and kind != state.type):
                meant = f"bnb_4bit_quant_type {kind}" if four else f"load_in_4bit {four}"
                raise CheckpointError(f"{self.path}: '{state.name}' is {state.type}, but config.json says {meant}")
        for name in sorted(self.eight) if not eight else ():
            raise CheckpointError(f"{self.path}: '{name}' is in 8 bits, but config.json says load_in_8bit {eight}")
        if not self.four and not self.eight:
            raise CheckpointError(
                f"{self.path}: config.json says bitsandbytes, but every tensor is in floating point; remove "
                "quantization_config from it to quantize them"
            )

    def _codes(self, state: FourBit, rows: range) -> Tensor:
        columns = state.shape[1]
        first, end = rows.start * columns, rows.stop * columns
        packed = _bytes(self.folder.located(state.name)).rows(slice(first // 2, -(-end // 2))).read()
        codes = torch.stack([packed >> 4, packed & 0xF], -1).flatten()
        return codes[first % 2 : first % 2 + end - first].reshape(-1, columns)

    def _scales(self, state: FourBit, rows: range) -> Tensor:
        """The scale of every group, [R, G]."""
        columns, group = state.shape[1], state.format.group
        assert isinstance(group, int)
        first, end = rows.start * columns, rows.stop * columns
        blocks = slice(first // state.block, -(-end // state.block))
        scales = self.scales(state, blocks)
        if group == state.block:
            return scales.reshape(-1, columns // group)
        of_group = torch.arange(first, end, group) // state.block - blocks.start
        return scales[of_group].reshape(-1, columns // group)

    def _part(self, state: FourBit, part: str, rows: slice | None = None) -> Tensor:
        found = self.folder.located(f"{state.name}.{part}")
        return replace(found, shape=(math.prod(found.shape),)).rows(rows).read()

    def _finite(self, scale: Tensor, name: str, part: str) -> Tensor:
        if not bool(scale.isfinite().all()):
            raise CheckpointError(f"{self.path}: scales of '{name}' ({part}) are NaN or Inf; the file is damaged")
        return scale


class BitsAndBytesWriter(FolderWriter):
    """Packs quantized entries, writes everything else as it is."""

    def __init__(self, path: Path, entries: Sequence[Entry], source: Path, config: Mapping[str, Any]) -> None:
        named = config.get("dtype") or config.get("torch_dtype")
        self._dtype = named if named in ("float16", "bfloat16") else "float32"
        super().__init__(path, entries, source, config)

    def arrays(self, entry: Entry) -> dict[str, ArraySpec]:
        if isinstance(entry.format, Float):
            return {entry.name: entry.format.arrays(entry.shape)["weight"]}
        return _arrays(entry, self._dtype)

    def encode(self, entry: Entry, part: QTensor, *, last: bool) -> dict[str, Tensor]:
        if isinstance(entry.format, Float):
            return {entry.name: part.codes}
        if isinstance(entry.format, LlmInt8):
            encoded = {entry.name: part.codes, _module(entry.name) + SCB: part.params["absmax"].reshape(-1)}
            return encoded | ({_module(entry.name) + LAYOUT: torch.tensor(0, dtype=torch.uint8)} if last else {})
        assert isinstance(entry.format, Codebook)
        encoded = {entry.name: pack(part.codes), f"{entry.name}.absmax": part.params["scale"].reshape(-1)}
        if last:
            state = torch.frombuffer(bytearray(_state_json(entry, self._dtype)), dtype=torch.uint8)
            encoded |= {f"{entry.name}.quant_map": torch.tensor(entry.format.table)}
            encoded |= {entry.name + STATE + entry.format.called: state}
        return encoded

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        matrices = [e for e in self._entries if len(e.shape) == 2 and e.name.endswith(WEIGHT)]
        packed = [e for e in matrices if not isinstance(e.format, Float)]
        plain = super().config(config)
        if not packed:
            return plain
        converted = [_module(e.name) for e in packed]
        kept = [_module(e.name) for e in matrices if isinstance(e.format, Float) and not EXPERT.search(e.name)]
        skipped = [name for name in dict.fromkeys((*kept, *OUTPUTS)) if name not in converted]
        return plain | {"quantization_config": quantization_config(packed[0].format, skipped, converted, self._dtype)}


def quantization_config(format: Format, skipped: Sequence[str], converted: Sequence[str], dtype: str) -> dict[str, Any]:
    """What transformers' BitsAndBytesConfig writes. skipped: modules that stay as they are; converted: the others."""
    four = isinstance(format, Codebook)
    return {
        "quant_method": METHOD,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": format.called if isinstance(format, Codebook) else "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": patterns(skipped, converted),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def pack(codes: Tensor) -> Tensor:
    """4-bit codes, uint8 [N, K], an even number of them, as uint8 [N·K/2, 1]."""
    pairs = codes.reshape(-1, 2)
    return pairs[:, :1] << 4 | pairs[:, 1:]


def _arrays(entry: Entry, dtype: str) -> dict[str, ArraySpec]:
    rows, columns = entry.shape
    if isinstance(entry.format, LlmInt8):
        return {
            entry.name: ArraySpec(torch.int8, entry.shape),
            _module(entry.name) + SCB: ArraySpec(torch.float32, (rows,)),
            _module(entry.name) + LAYOUT: ArraySpec(torch.uint8, ()),
        }
    assert isinstance(entry.format, Codebook)
    assert isinstance(entry.format.group, int)
    return {
        entry.name: ArraySpec(torch.uint8, (rows * columns // 2, 1)),
        f"{entry.name}.absmax": ArraySpec(torch.float32, (rows * columns // entry.format.group,)),
        f"{entry.name}.quant_map": ArraySpec(torch.float32, (16,)),
        entry.name + STATE + entry.format.called: ArraySpec(torch.uint8, (len(_state_json(entry, dtype)),)),
    }


def _state_json(entry: Entry, dtype: str) -> bytes:
    assert isinstance(entry.format, Codebook)
    facts = {
        "quant_type": entry.format.called,
        "blocksize": entry.format.group,
        "dtype": dtype,
        "shape": list(entry.shape),
    }
    return json.dumps(facts).encode()


def _format_trouble(entry: Entry) -> str | None:
    format = entry.format
    if entry.inputs is not None:
        return f"bitsandbytes has no rounded inputs, such as {entry.inputs}; leave --inputs out"
    if isinstance(format, LlmInt8):
        return None
    if not isinstance(format, Codebook):
        return f"bitsandbytes holds nf4, fp4 and llm-int8, not {format}; choose one of them, or write fewbits instead"
    if isinstance(format, NormalFloat) and format.double:
        return (
            f"bitsandbytes quantizes scales by another map than {format}, so it cannot hold them exactly; choose nf4, "
            "or write fewbits instead"
        )
    if format.group not in BLOCKS:
        return f"bitsandbytes has blocks of {', '.join(map(str, BLOCKS))}, not of {format.group}; write fewbits instead"
    return None


def _name_trouble(entry: Entry) -> str | None:
    if len(entry.shape) != 2 or not entry.name.endswith(WEIGHT) or EMBEDDING.search(entry.name):
        return (
            "bitsandbytes quantizes linear layers, whose weight is a matrix named '….weight', not "
            f"{list(entry.shape)}; keep it in floating point, or write fewbits instead"
        )
    if EXPERT.search(entry.name):
        return "transformers fuses experts, which no bitsandbytes layer holds; keep them in floating point"
    group = getattr(entry.format, "group", None)
    if isinstance(group, int) and entry.shape[1] % group:
        return (
            f"in_features {entry.shape[1]} is not a multiple of {group}, and bitsandbytes' blocks run on into the next "
            "row; choose a smaller group, keep it in floating point, or write fewbits instead"
        )
    return None


def _is_ours(quantization: Mapping[str, Any]) -> bool:
    method = quantization.get("quant_method")
    unnamed = method is None and any(_says(quantization, f"load_in_{bits}bit") for bits in (4, 8))
    return method == METHOD or unnamed


def _says(quantization: Mapping[str, Any], key: str) -> bool:
    """A flag, which transformers writes with and without an underscore."""
    return quantization.get(key, quantization.get(f"_{key}", False)) is True


def _module(weight: str) -> str:
    return weight.removesuffix(WEIGHT)


def _bytes(array: Located) -> Located:
    """The same data as bytes in a row."""
    return replace(array, dtype=torch.uint8, shape=(array.nbytes,))


def _state(array: Located, name: str) -> dict[str, Any]:
    """The JSON in an array. Raises CheckpointError if it is not an object."""
    if array.dtype != torch.uint8 or array.nbytes > LONGEST_STATE:
        raise CheckpointError(f"{array.file}: '{name}' is {array.dtype} {list(array.shape)}, must be a little JSON")
    try:
        found = json.loads(bytes(array.read().reshape(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{array.file}: '{name}' is not JSON ({error}); the file is damaged") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{array.file}: '{name}' is a JSON {type(found).__name__}, must be an object")
    return found


def _checked_state(where: str, name: str, type: str, facts: Mapping[str, Any]) -> FourBit:
    shape, block = facts.get("shape"), facts.get("blocksize")
    if type not in TYPES or facts.get("quant_type") != type:
        raise CheckpointError(f"{where}: quant_type is {facts.get('quant_type')!r}, must be {' or '.join(TYPES)}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        raise CheckpointError(f"{where}: shape is {shape!r}, must be [out_features, in_features]")
    if not _is_size(block) or block not in BLOCKS:
        raise CheckpointError(f"{where}: blocksize is {block!r}, must be one of {', '.join(map(str, BLOCKS))}")
    if "nested_blocksize" not in facts and "nested_offset" not in facts:
        return FourBit(name, (shape[0], shape[1]), block, type)
    nested, offset = facts.get("nested_blocksize"), facts.get("nested_offset")
    if not _is_size(nested) or not isinstance(offset, float) or not math.isfinite(offset):
        raise CheckpointError(
            f"{where}: nested_blocksize is {nested!r} and nested_offset {offset!r}, must be a size and a number"
        )
    return FourBit(name, (shape[0], shape[1]), block, type, nested, offset)


def _span(path: Path, state: FourBit, rows: slice | None) -> range:
    found = range(state.shape[0])[rows or slice(None)]
    if found.step != 1:
        raise CheckpointError(f"{path}: rows {rows} of '{state.name}' are not a run of rows; read slice(start, stop)")
    return range(found.start, max(found.start, found.stop))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _decoded_by_the_library(reader: BitsAndBytesReader) -> Iterator[tuple[str, int, Tensor]]:
    """Every entry as bitsandbytes (or safetensors, what is not quantized) decodes it."""
    for name, entry in reader.entries.items():
        if name in reader.four:
            yield from _four_by_the_library(reader, reader.four[name])
        elif name in reader.eight:
            yield from _eight_by_the_library(reader, name, entry.shape)
        else:
            yield from rows_by_the_library(reader.folder.located(name).file, name)


def _four_by_the_library(reader: BitsAndBytesReader, state: FourBit) -> Iterator[tuple[str, int, Tensor]]:
    from bitsandbytes import functional

    folder, (rows, columns) = reader.folder, state.shape
    parts = {part: folder.read(f"{state.name}.{part}").reshape(-1) for part in state.parts()}
    facts = _state(folder.located(state.name + STATE + state.type), state.name)
    theirs = functional.QuantState.from_dict(facts | parts, device=torch.device("cpu"))
    absmax = theirs.absmax.float()
    if theirs.nested:
        absmax = functional.dequantize_blockwise(theirs.absmax, theirs.state2) + theirs.offset
    step = FOREIGN_PART if columns % state.block == 0 else rows * columns
    for slab in row_slabs(state.shape, step):
        first, end = slab.start * columns, slab.stop * columns
        packed = _bytes(folder.located(state.name)).rows(slice(first // 2, -(-end // 2))).read()
        scales = absmax[first // state.block : -(-end // state.block)].contiguous()
        # A block in each row: version 0.50.2's AVX-512 kernel takes wrong scales where blocks cross from row to row.
        part = functional.QuantState(
            absmax=scales,
            shape=torch.Size((len(scales), state.block)),
            code=theirs.code,
            blocksize=state.block,
            quant_type=state.type,
            dtype=torch.float32,
        )
        whole = pad(packed, (0, len(scales) * state.block // 2 - len(packed)))
        numbers = functional.dequantize_4bit(whole.reshape(-1, 1), part).flatten()[: end - first]
        yield state.name, slab.start, numbers.view(len(slab), columns)


def _eight_by_the_library(
    reader: BitsAndBytesReader, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, int, Tensor]]:
    from bitsandbytes import functional

    absmax = reader.folder.read(_module(name) + SCB).float().reshape(-1)
    for slab in row_slabs(shape, FOREIGN_PART):
        codes = reader.folder.read(name, slice(slab.start, slab.stop))
        yield name, slab.start, functional.int8_vectorwise_dequant(codes, absmax[slab.start : slab.stop])
